"""From task names and local files to the harness's results. Knows the harness's task files, nothing of models.

A task with local data gets a task file of its own that includes the harness's and names the data in place of the hub's.
"""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from specproxy.errors import ConfigurationError, SpecProxyError
from specproxy.integrations.lm_eval.model import ProxyTunedLM, quiet_loggers

__all__ = ["Evaluation", "evaluate_tasks"]

_OWN_TASKS = Path(__file__).parents[2] / "tasks"
_ANNOTATED = "alpaca_farm"


@dataclass
class Evaluation:
    """What came of it.

    Args:
        results: the harness's own: metrics under `results`, every output under `samples`.
    """

    results: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Per task its metrics, under the harness's names (`exact_match,strict-match`), standard errors among them."""
        return {
            task: {name: value for name, value in values.items() if name != "alias"}
            for task, values in self.results["results"].items()
        }

    @property
    def outputs(self) -> dict[str, list[Any]]:
        """Per task and document what the model wrote, or its log-likelihoods: a list per request of the document."""
        return {
            task: [sample["resps"] for sample in samples]
            for task, samples in _by_document(self.results["samples"]).items()
        }

    def annotator_outputs(self, generator: str) -> list[dict[str, str]]:
        """Outputs of `alpaca_farm` as its annotators read them.

        Args:
            generator: what they are to call the model.
        """
        samples = _by_document(self.results["samples"]).get(_ANNOTATED, [])
        return [
            {
                "instruction": str(sample["doc"]["instruction"]),
                "input": str(sample["doc"].get("input") or ""),
                "output": str(sample["resps"][0][0]).strip(),
                "generator": generator,
                "dataset": str(sample["doc"].get("dataset") or _ANNOTATED),
            }
            for sample in samples
        ]


def _by_document(samples: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """One sample per document, in their order: several filters of a task log the same responses."""
    unique = {task: {int(sample["doc_id"]): sample for sample in lines} for task, lines in samples.items()}
    return {task: [documents[i] for i in sorted(documents)] for task, documents in unique.items()}


def evaluate_tasks(
    lm: ProxyTunedLM,
    tasks: Sequence[str],
    *,
    data: Mapping[str, Mapping[str, Path]] | None = None,
    include_paths: Sequence[Path] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    classifier: Path | None = None,
    seed: int = 0,
) -> Evaluation:
    """Run tasks of the harness, of this package and of the user's own folders.

    Args:
        lm: the model.
        tasks: names.
        data: per task and split a file of JSON lines; the empty split is what is evaluated.
        include_paths: folders with task files.
        limit: most documents of a task.
        num_fewshot: examples ahead of every document; the task's own number by default.
        chat: render conversations by the model's templates.
        system: a system message, with `chat`.
        generation: arguments of generation in place of the task's, under the harness's names.
        classifier: folder of the classifier for `toxigen_generation`.
        seed: of the few-shot examples and of bootstraps.

    Raises:
        ConfigurationError: an unknown task, or data that are neither given nor to be had.
        SpecProxyError: as generation raises.
    """
    data = data or {}
    strangers = sorted(set(data) - set(tasks))
    if strangers:
        raise ConfigurationError(f"--data names {', '.join(strangers)}, which is not among --tasks.")
    folders = [str(_OWN_TASKS), *map(str, include_paths)]
    with quiet_loggers(), _clear_errors(tasks, data), tempfile.TemporaryDirectory(prefix="specproxy-tasks-") as own:
        known = _manager(folders, tasks)
        for task, files in data.items():
            _write_task_file(Path(own), task, known.task_index[task].yaml_path, files, classifier)
        local = TaskManager(include_path=own, include_defaults=False) if data else known
        loaded = {task: _load(local if task in data else known, task) for task in tasks}
        for task, files in data.items():
            _check_examples(task, loaded[task], files, num_fewshot)
        results = evaluator.simple_evaluate(
            lm,
            tasks=[item for items in loaded.values() for item in items],
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=1000,
            system_instruction=system,
            apply_chat_template=chat,
            gen_kwargs=dict(generation) if generation else None,
            task_manager=known,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return Evaluation(results)


def _manager(folders: list[str], tasks: Sequence[str]) -> TaskManager:
    """The index of task files, of no more folders than the tasks need: that of the whole harness takes a while.

    Raises:
        ConfigurationError: for a task that is nowhere.
    """
    harness = Path(lm_eval.tasks.__file__).parent
    near = sorted({str(path.parent) for task in tasks for path in harness.glob(f"*/{glob.escape(task)}.yaml")})
    manager = TaskManager(include_path=[*near, *folders], include_defaults=False)
    if any(task not in manager.task_index for task in tasks):
        manager = TaskManager(include_path=folders)
    for task in tasks:
        if task not in manager.task_index:
            raise ConfigurationError(f"--tasks={task}: no such task here, in the harness or in --include-path.")
    return manager


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The tasks of a name, which may be one of several."""
    loaded = manager.load(name)
    return list(loaded["groups"].values()) or list(loaded["tasks"].values())


def _check_examples(name: str, tasks: Sequence[Any], files: Mapping[str, Path], num_fewshot: int | None) -> None:
    """Few-shot examples must not come from what is evaluated, where the task means them to come from elsewhere."""
    for task in tasks:
        own = task.config.num_fewshot
        shots = own if num_fewshot is None or own == 0 else num_fewshot
        split = task.config.fewshot_split or task.config.training_split or task.config.validation_split
        if shots and split not in files and split != (task.config.test_split or task.config.validation_split):
            raise ConfigurationError(
                f"task {name} takes its {shots} examples from its split {split}; give --data {name}:{split}=FILE, or "
                "--num-fewshot 0."
            )


def _write_task_file(
    folder: Path, task: str, original: Path | None, files: Mapping[str, Path], classifier: Path | None
) -> None:
    """A task file that includes the original one and reads local data."""
    if original is None:
        raise ConfigurationError(f"--data {task}: a group of tasks has no data of its own; name its tasks.")
    arguments = {
        "files": {split: str(path.resolve()) for split, path in files.items()},
        "classifier": None if classifier is None else str(classifier),
    }
    for path in files.values():
        if not path.is_file():
            raise ConfigurationError(f"--data {task}={path} is no file.")
    body = yaml.safe_dump({"include": str(original), "task": task, "dataset_kwargs": arguments})
    function = "custom_dataset: !function specproxy.integrations.lm_eval.data.local_data\n"
    (folder / f"{task}.yaml").write_text(body + function, encoding="utf-8")


@contextlib.contextmanager
def _clear_errors(tasks: Sequence[str], data: Mapping[str, Any]) -> Iterator[None]:
    """What a missing data set makes the libraries raise, as one error that says what to give."""
    try:
        yield
    except SpecProxyError:
        raise
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & {"ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
            raise
        missing = ", ".join(task for task in tasks if task not in data)
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError(
            f"the data of {missing} are not here and could not be fetched ({first}); give --data TASK=FILE."
        ) from error
