"""The project's report: quality and speed of the embedded trio, measured again, and written as a page with charts.

    quality ...   held-out problems answered by the shipped base, its expert and the proxy-tuned trio
    speed ...     `benchmarks/latency.py` on the shipped trio, and on the trio whose base is grown to a large one's cost

What tuning from several seeds reaches, and a base that was tuned directly, is not in the package: the newest record of
`training.seeds` in the folder of results says it. The page is `REPORT.md`; its headline figures are also put into
README.md, between two comments that name this command.

Every finished step is kept in the day's record, so that a run which was broken off goes on; `--again` runs some once
more. Speeds are worth something on an idle machine only.

Example:
    python benchmarks/report.py --threads 2
    python benchmarks/report.py --quick --folder out
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console

from benchmarks import latency
from benchmarks.device_time import machine
from benchmarks.page import SCORINGS, draw, headline, page
from benchmarks.steps import PASSED, Step, run_steps
from benchmarks.tables import require_matplotlib
from specproxy import ProxyTunedModel, SpecProxyError
from specproxy.problems import Problem, held_out
from specproxy.scoring import score_answers
from training.evaluate import LONGEST_ANSWER, answers
from training.laws import Law

__all__ = ["main", "report_steps", "write_headline", "write_report"]

ROOT = Path(__file__).resolve().parents[1]
OPENING, CLOSING = "<!-- figures: python benchmarks/report.py -->", "<!-- end of figures -->"
ROWS = 32  # problems answered at a time


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        problems: of the test split.
        speed: arguments of `benchmarks/latency.py` by the name of a step.
    """

    problems: int
    speed: dict[str, list[str]]


_GROWN = ["--cost-ratio", "0.1"]
FULL = Sizes(
    500,
    {
        "arithmetic, as shipped": ["--num-draft-tokens", "4", "8", "auto", "--repeats", "5"],
        "arithmetic, base grown": [*_GROWN, "--num-draft-tokens", "4", "8", "10", "auto", "--repeats", "5"],
        "arithmetic, base grown, 8 rows": [
            *_GROWN, "--batch-sizes", "8", "--num-prompts", "8", "--num-draft-tokens", "4", "8", "auto", "--repeats",
            "3", "--skip", "expert", "base_generate",
        ],
        "python, base grown": [
            "--demo", "python", *_GROWN, "--num-draft-tokens", "2", "4", "auto", "--repeats", "3", "--skip", "expert",
        ],
        "python, base grown, sampled": [
            "--demo", "python", *_GROWN, "--do-sample", "--acceptance", "rejection", "block", "coupled",
            "--num-draft-tokens", "4", "--repeats", "3", "--skip", "expert", "base", "plain",
        ],
    },
)  # fmt: skip
_LITTLE = ["--num-prompts", "1", "--max-new-tokens", "8", "--repeats", "1"]
QUICK = Sizes(
    4,
    {
        "arithmetic, as shipped": [*_LITTLE, "--num-draft-tokens", "4"],
        "python, base grown": [
            "--demo", "python", "--cost-ratio", "0.1", "--cost-by", "parameters", *_LITTLE, "--num-draft-tokens", "2",
        ],
    },
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the page.

    Returns:
        The exit code: 0, 1 where a step failed, or 2 after an error, which stands on standard error in one line.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose figures mean nothing; needs --folder")
    parser.add_argument("--folder", type=Path, help="of REPORT.md, charts and results/; benchmarks by default")
    parser.add_argument("--record", type=Path, help="of finished steps; results/TODAY-MACHINE-report.json by default")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="steps to run, by the start of a name")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="finished steps to run once more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args(arguments)
    try:
        if options.quick and options.folder is None:
            raise ValueError("--quick yields figures without meaning: name a --folder for them.")
        require_matplotlib()  # a missing one should be known before the work is done
        return _report(options)
    except (SpecProxyError, ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _report(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    folder = options.folder or ROOT / "benchmarks"
    about = machine(torch.device("cpu"))
    path = options.record or folder / "results" / f"{datetime.date.today()}-{about['device']}-report.json"
    console = Console(stderr=True)
    steps = [
        step
        for step in report_steps(QUICK if options.quick else FULL, options.threads)
        if step.name.startswith(tuple(options.only))
    ]
    record = run_steps(steps, path, about, float("inf"), lambda line: console.print(line, markup=False), options.again)
    write_report(folder, record, newest_tuning(folder / "results"))
    if options.folder is None:
        write_headline(ROOT / "README.md", record, newest_tuning(folder / "results"))
    return int(any(record["steps"][step.name]["status"] != PASSED for step in steps))


def report_steps(sizes: Sizes, threads: int) -> list[Step]:
    """What is measured, in order."""
    problems = held_out("arithmetic", "test", sizes.problems)
    solvers = {"base": by_itself, "expert": by_itself, "proxy-tuned": by_the_runtime}
    return [
        *(Step(f"quality {law}", partial(_quality, solve, law, problems)) for law, solve in solvers.items()),
        *(Step(f"speed {name}", partial(_speed, given, threads)) for name, given in sizes.speed.items()),
    ]


def _quality(
    solve: Callable[[ProxyTunedModel, str, list[str]], tuple[list[str], dict[str, Any]]],
    law: str,
    problems: list[Problem],
) -> tuple[dict[str, Any], list[str]]:
    texts, more = solve(ProxyTunedModel.demo("arithmetic"), law, [problem.prompt for problem in problems])
    right = score_answers(texts, [problem.answer or "" for problem in problems])
    bits = {name: "".join("01"[solved] for solved in getattr(right, name).astype(int)) for name in SCORINGS}
    return {"problems": len(problems), **bits, **more}, []


def by_itself(model: ProxyTunedModel, law: str, prompts: list[str]) -> tuple[list[str], dict[str, Any]]:
    return answers(Law.of(getattr(model, law)), model.tokenizer, prompts, ROWS), {}


def by_the_runtime(model: ProxyTunedModel, law: str, prompts: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Greedy, with drafts, as a user would."""
    texts, drafted, accepted = [], 0, 0
    for start in range(0, len(prompts), ROWS):
        inputs = model.tokenizer(prompts[start : start + ROWS], return_tensors="pt", padding=True, padding_side="left")
        output: Any = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, return_dict_in_generate=True)
        new = output.sequences[:, inputs.input_ids.size(1) :]
        texts += model.tokenizer.batch_decode(new, skip_special_tokens=True)
        drafted += output.speculation.num_draft_tokens
        accepted += output.speculation.num_accepted_tokens
    return texts, {"alpha": model.alpha, "acceptance_rate": accepted / drafted}


def _speed(given: list[str], threads: int) -> tuple[dict[str, Any], list[str]]:
    """A record of `benchmarks/latency.py`; greedy drafts that changed a token are a fault."""
    result = latency.measured([*given, "--threads", str(threads)])
    return result, [
        f"{name} gave other tokens than per_step"
        for batch in result["batches"]
        for name, row in batch["decoders"].items()
        if row.get("same_tokens_as_per_step") is False
    ]


def newest_tuning(results: Path) -> dict[str, Any] | None:
    """The newest record of `training.seeds` among the results, if there is one."""
    found = sorted(results.glob("*-trio.json"))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def write_report(folder: Path, record: dict[str, Any], tuning: dict[str, Any] | None) -> None:
    """Writes the page and its charts.

    Args:
        folder: Gets ``REPORT.md`` and ``report-*.png``.
        record: Of `run_steps`; steps that it lacks are left out of the page.
        tuning: Of `training.seeds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    charts = draw(folder, record, tuning)
    (folder / "REPORT.md").write_text(page(record, tuning, charts), encoding="utf-8")


def write_headline(readme: Path, record: dict[str, Any], tuning: dict[str, Any] | None) -> None:
    """Puts the headline figures between the two comments of a text.

    Raises:
        ValueError: The comments are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, opening, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not closing:
        raise ValueError(f"{readme} lacks the lines {OPENING!r} and {CLOSING!r}.")
    lines = "\n".join(headline(record, tuning))
    readme.write_text(f"{before}{opening}\n{lines}\n{closing}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
