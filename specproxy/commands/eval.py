"""`specproxy eval`: tasks of lm-evaluation-harness on a proxy-tuned model. Knows options, files and a table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specproxy.commands.arguments import BatchOptions, DeviceOptions, ModelOptions
from specproxy.commands.loading import load, quiet
from specproxy.errors import ConfigurationError
from specproxy.model import ProxyTunedModel
from specproxy.stats import SpeculationStats

if TYPE_CHECKING:
    from specproxy.integrations.lm_eval import Evaluation

__all__ = ["evaluate"]

OWN_TASK = "specproxy_arithmetic"
ANNOTATED_TASK = "alpaca_farm"
TOXICITY_TASK = "toxigen_generation"

Template = Annotated[
    str | None, typer.Option(metavar="chat|raw|JINJA", help="How this role reads a conversation; implies --chat.")
]


def evaluate(
    models: ModelOptions,
    batches: BatchOptions,
    where: DeviceOptions,
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas between them.")] = OWN_TASK,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK[:SPLIT]=FILE", help="JSON lines in place of a task's data set; may be repeated."),
    ] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="Folder with further task files.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples ahead; the task's own by default.")] = None,
    max_gen_toks: Annotated[int | None, typer.Option(min=1, help="Most new tokens; the task's by default.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and output.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Render conversations by chat templates.")] = False,
    base_template: Template = None,
    expert_template: Template = None,
    anti_expert_template: Template = None,
    system: Annotated[str | None, typer.Option(help="A system message; implies --chat.")] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Classifier of toxic text for toxigen_generation: a folder.")
    ] = None,
    against_per_step: Annotated[
        bool, typer.Option("--against-per-step", help="Run per-step decoding too; compare outputs and time.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write metrics and all outputs as JSON.")] = None,
    annotator_output: Annotated[
        Path | None, typer.Option(help="Write the outputs of alpaca_farm as its annotators read them.")
    ] = None,
) -> None:
    """Score a proxy-tuned model on tasks of lm-evaluation-harness."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    files = _files(data or [])
    _check(names, files, classifier, annotator_output, against_per_step, batches)
    lm_eval = _integration()
    with quiet(to_stderr=True):
        model = load(models, where, batches)

        def run(drafting: dict[str, Any]) -> tuple[Evaluation, dict[str, Any]]:
            lm = lm_eval.ProxyTunedLM(
                model,
                alpha=batches.alpha,
                **drafting,
                seed=batches.seed,
                batch_size=batches.batch_size,
                max_length=max_length,
                base_template=base_template,
                expert_template=expert_template,
                anti_expert_template=anti_expert_template,
            )
            evaluation = lm_eval.evaluate_tasks(
                lm,
                names,
                data=files,
                include_paths=include_path or [],
                limit=batches.limit,
                num_fewshot=num_fewshot,
                chat=chat or bool(system or base_template or expert_template or anti_expert_template),
                system=system,
                generation=None if max_gen_toks is None else {"max_gen_toks": max_gen_toks},
                classifier=classifier,
                seed=batches.seed,
            )
            return evaluation, generation_summary(lm.speculation)

        began = time.perf_counter()
        evaluation, generation = run(batches.drafting)
        per_step = run({"num_draft_tokens": 0, "acceptance": batches.acceptance}) if against_per_step else None
    record: dict[str, Any] = {
        "tasks": evaluation.metrics,
        "alpha": model.alpha if batches.alpha is None else batches.alpha,
        "num_draft_tokens": batches.drafts,
        "generation": generation,
        "seconds": time.perf_counter() - began,
    }
    if per_step is not None:
        record["per_step"] = _compared(evaluation, generation, *per_step)
    if output is not None:
        output.write_text(json.dumps(record | {"outputs": evaluation.outputs}, default=float) + "\n", encoding="utf-8")
    if annotator_output is not None:
        outputs = evaluation.annotator_outputs(generator=_generator(model))
        annotator_output.write_text(json.dumps(outputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(Console(highlight=False), record)


def generation_summary(batches: Sequence[SpeculationStats]) -> dict[str, Any]:
    """Tokens, time and acceptance over all batches; `tokens_per_second` is None where nothing was generated."""
    tokens, seconds = sum(s.num_new_tokens for s in batches), sum(s.seconds["total"] for s in batches)
    drafted = sum(s.num_draft_tokens for s in batches)
    return {
        "num_new_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else None,
        "acceptance_rate": sum(s.num_accepted_tokens for s in batches) / drafted if drafted else None,
    }


def _files(data: list[str]) -> dict[str, dict[str, Path]]:
    """`TASK[:SPLIT]=FILE` as files by task and split."""
    files: dict[str, dict[str, Path]] = {}
    for text in data:
        name, _, path = text.partition("=")
        task, _, split = name.partition(":")
        if not task or not path:
            raise ConfigurationError(f"--data={text} names no task and file; give TASK=FILE or TASK:SPLIT=FILE.")
        if not Path(path).is_file():
            raise ConfigurationError(f"--data={text}: there is no such file.")
        files.setdefault(task, {})[split] = Path(path)
    return files


def _check(
    names: list[str],
    files: dict[str, dict[str, Path]],
    classifier: Path | None,
    annotator_output: Path | None,
    against_per_step: bool,
    batches: BatchOptions,
) -> None:
    """What can be known to fail before anything is loaded."""
    if not names:
        raise ConfigurationError("--tasks= names no task.")
    for task in (TOXICITY_TASK, ANNOTATED_TASK):
        if task in names and "" not in files.get(task, {}):
            raise ConfigurationError(f"--tasks={task} has local data only; give --data {task}=FILE.")
    if (TOXICITY_TASK in names) != (classifier is not None):
        raise ConfigurationError(f"--classifier and --tasks={TOXICITY_TASK} go together; give both or neither.")
    if annotator_output is not None and ANNOTATED_TASK not in names:
        raise ConfigurationError(f"--annotator-output serves --tasks={ANNOTATED_TASK}; add it or leave the file out.")
    if against_per_step and batches.drafts == 0:
        raise ConfigurationError("--against-per-step compares speculation; with --num-draft-tokens=0 there is none.")


def _integration() -> Any:
    try:
        import specproxy.integrations.lm_eval
    except ImportError as error:
        raise ConfigurationError(
            f"eval needs lm-evaluation-harness ({error}); install it with: pip install 'specproxy[eval]'"
        ) from error
    return specproxy.integrations.lm_eval


def _compared(
    evaluation: Evaluation, generation: dict[str, Any], other: Evaluation, other_generation: dict[str, Any]
) -> dict[str, Any]:
    """Per-step decoding beside speculation: how many outputs are the same, and the ratio of times."""
    pairs = [
        pair for task, outputs in evaluation.outputs.items() for pair in zip(outputs, other.outputs[task], strict=True)
    ]
    timed = bool(generation["num_new_tokens"])
    return {
        "tasks": other.metrics,
        "generation": other_generation,
        "num_outputs": len(pairs),
        "num_same_outputs": sum(ours == theirs for ours, theirs in pairs),
        "times_faster": other_generation["seconds"] / generation["seconds"] if timed else None,
    }


def _generator(model: ProxyTunedModel) -> str:
    names = [Path(str(m.name_or_path)).name or "model" for m in (model.base, model.expert)]
    return f"{names[0]} proxy-tuned by {names[1]}"


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table()
    for name in ("task", "metric", "filter"):
        table.add_column(name)
    for name in ("value", "standard error", "documents"):
        table.add_column(name, justify="right")
    for task, metrics in record["tasks"].items():
        for name, value in metrics.items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            shown = f"{error:.4f}" if isinstance(error, float) else "-"
            table.add_row(task, metric, kept, f"{value:.4f}", shown, str(metrics.get("sample_len", "-")))
    console.print(table)
    generation = record["generation"]
    if generation["num_new_tokens"]:
        rate = generation["acceptance_rate"]
        accepted = "" if rate is None else f", {rate:.1%} of drafts accepted"
        console.print(
            f"{generation['num_new_tokens']} tokens in {generation['seconds']:.1f} s: "
            f"{generation['tokens_per_second']:.1f} tokens/s{accepted}"
        )
    if "per_step" in record:
        beside = record["per_step"]
        times = "" if beside["times_faster"] is None else f"; {beside['times_faster']:.2f} times as fast"
        console.print(
            f"per-step decoding: {beside['num_same_outputs']} of {beside['num_outputs']} outputs are the same{times}"
        )
