"""`num_draft_tokens="auto"` against every fixed number of drafts, on a virtual clock.

Texts are decoded by the embedded trios under greedy decoding and `coupled` sampling, and recorded with the place of
each token among the expert's candidates (`benchmarks/recordings.py`). Since equality decides there, a recording tells
what any window would have given, so that all settings are replayed exactly on one clock (`benchmarks/replay.py`):
tables of costs at wanted ratios t_small / t_base, in which a forward reads its weights once and every token adds a
small share, and this machine's own forwards with --calibrate. What the policy is told is noisy, with spikes; the clock
is not. Where the policy lets entropies decide a draft's length it is replayed without that as well.

Texts: arithmetic and Python by their own trios; "foreign" and "random", Python with experts that draft badly (the
arithmetic pair; random weights); "turning", the random expert's text that becomes the arithmetic expert's.

A table goes to standard error, one JSON line to standard output.

Example:
    python benchmarks/policy_replay.py --recordings recordings.json --calibrate --wall --plot auto.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.prompts import demo_prompts
from benchmarks.recordings import adversarial_model, record
from benchmarks.replay import Costs, Recording, Replay, best_fixed, replay
from benchmarks.tables import require_matplotlib
from specproxy import ProxyTunedModel
from specproxy.attention import borrowed
from specproxy.auto import AutoPolicy
from specproxy.policy import FixedWindow
from specproxy.runner import Runner

__all__ = ["main", "replay_case", "rows_of", "turning"]

COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
LAWS = ("greedy", "coupled")
TEXTS = ("arithmetic", "python", "foreign", "random")
WIDTHS = (1, 2, 3, 5, 9, 17)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, replay and print.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.plot is not None:
            require_matplotlib()
        print(json.dumps(measure(options)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument(
        "--recordings", type=Path, help="read recordings from this file; write them where it is missing"
    )
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--skip-prompts", type=int, default=0, help="leave out so many of the first prompts")
    parser.add_argument("--seed", type=int, default=1, help="of the texts that are sampled")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--cost-ratios", type=float, nargs="+", default=[0.05, 0.1, 0.5])
    parser.add_argument("--slope", type=float, default=1 / 256, help="share of a forward that one more token adds")
    parser.add_argument("--noise", type=float, default=0.1, help="relative spread of the times that the policy is told")
    parser.add_argument("--calibrate", action="store_true", help="replay at the costs of this machine's forwards too")
    parser.add_argument("--wall", action="store_true", help="decode the tasks for real as well, by the wall's clock")
    parser.add_argument("--threads", type=int, help="of torch; its own default otherwise")
    parser.add_argument("--plot", type=Path, help="write a chart to this PNG file (needs matplotlib)")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as the record that is printed."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    recordings = _recordings(options)
    tables = {f"c = {ratio}": Costs.memory_bound(ratio, options.slope) for ratio in options.cost_ratios}
    if options.calibrate:
        tables["this machine"] = calibrated(options.batch_sizes)
    cases = []
    work = [(text, batch, table) for text in recordings for batch in options.batch_sizes for table in tables]
    for text, batch, table in track(work, "Replaying", console=Console(stderr=True)):
        case = replay_case(rows_of(recordings[text], batch), batch, tables[table], options.noise)
        cases.append({"text": text, "batch": batch, "costs": table, **case})
    result: dict[str, Any] = {"cases": cases, "acceptance": {k: _acceptance(v) for k, v in recordings.items()}}
    if {"random", "arithmetic"} <= set(options.texts):
        result["turning"] = [
            {"law": law, "batch": batch, "costs": name, "cycles_to_recover": cycles}
            for law in LAWS
            for batch in options.batch_sizes
            for name, costs in tables.items()
            for cycles in [turning(recordings[f"random {law}"], recordings[f"arithmetic {law}"], batch, costs)]
        ]
    if options.wall:
        result["wall"] = [_wall(text, options) for text in options.texts if text in ("arithmetic", "python")]
    result["bars"] = _bars(result)
    _print(result)
    if options.plot is not None:
        _plot(cases, options.plot)
    return result


def replay_case(texts: Sequence[Recording], batch: int, costs: Costs, noise: float) -> dict[str, Any]:
    """One text at one batch size and table: auto, and every fixed number of drafts."""
    fixed = best_fixed(texts, batch, costs, COUNTS)
    auto = replay(AutoPolicy(), texts, batch, costs, noise)
    plain = replay(AutoPolicy(stops=False), texts, batch, costs, noise)
    best = max(fixed, key=lambda count: fixed[count])
    return {
        "auto_over_best_fixed": auto.rate / fixed[best],
        "auto_over_per_step": auto.rate / fixed[0],
        "auto_without_stops_over_best_fixed": plain.rate / fixed[best],
        "stops": _stops(auto),
        "best_fixed": best,
        "best_fixed_over_per_step": fixed[best] / fixed[0],
        "fixed_over_per_step": {count: rate / fixed[0] for count, rate in fixed.items()},
        "per_step_share": auto.per_step_share,
        "windows": dict(sorted(Counter(plan.num_drafts for plan in auto.plans).items())),
    }


def _stops(auto: Replay) -> dict[str, int]:
    """Cycles whose length entropies decided: with fewer drafts than planned, as many, and more."""
    beyond = [plan.num_drafts - plan.stop.planned for plan in auto.plans if plan.stop is not None]
    return {
        "shorter": sum(count < 0 for count in beyond),
        "as_planned": beyond.count(0),
        "longer": sum(count > 0 for count in beyond),
    }


def rows_of(recordings: Sequence[Recording], batch: int) -> list[Recording]:
    """Texts for a batch: each once for one row, else three a row, of lengths that differ from round to round."""
    if batch == 1:
        return list(recordings)
    rows = []
    for i in range(3 * batch):
        text, turn = recordings[i % len(recordings)], i // len(recordings)
        rows.append(text.shortened(len(text.ranks) - turn * 7 % (len(text.ranks) // 3 + 1)))
    return rows


def turning(hard: Sequence[Recording], easy: Sequence[Recording], batch: int, costs: Costs) -> int | None:
    """Cycles from the place where every row's text has turned easy to the first with three drafts; None for never."""
    place = min(len(text.ranks) for text in hard)
    texts = [Recording(hard[row % len(hard)].ranks[:place] + easy[row % len(easy)].ranks * 2) for row in range(batch)]
    result = replay(AutoPolicy(), texts, batch, costs, noise=0.1)
    turned = next(i for i, places in enumerate(result.places) if min(places.values()) >= place)
    return next((i for i, plan in enumerate(result.plans[turned:]) if plan.num_drafts >= 3), None)


def _acceptance(texts: Sequence[Recording]) -> float:
    """Accepted over drafted of a fixed window of four."""
    reports = replay(FixedWindow(4), texts, 1, Costs.memory_bound(0.1)).reports
    return sum(sum(report.num_accepted) for report in reports) / sum(sum(report.num_drafts) for report in reports)


def _recordings(options: argparse.Namespace) -> dict[str, list[Recording]]:
    """Of every text under both laws: from the file, else made now and written there."""
    wanted = [f"{text} {law}" for text in options.texts for law in LAWS]
    if options.recordings is not None and options.recordings.exists():
        stored = json.loads(options.recordings.read_text(encoding="utf-8"))
        missing = [name for name in wanted if name not in stored]
        if missing:
            raise ValueError(f"{options.recordings} has no recording of {missing[0]}; remove it to record anew.")
        if not all(len(text) == len(fields(Recording)) for name in wanted for text in stored[name]):
            raise ValueError(f"{options.recordings} is of an earlier format; remove it to record anew.")
        return {name: [Recording(*map(tuple, text)) for text in stored[name]] for name in wanted}
    found: dict[str, list[Recording]] = {}
    for name in track(wanted, "Recording", console=Console(stderr=True)):
        text, law = name.split()
        task = "arithmetic" if text == "arithmetic" else "python"
        model = ProxyTunedModel.demo(task) if text == task else adversarial_model(text)
        wanted_prompts = demo_prompts(task, options.skip_prompts + options.num_prompts)[options.skip_prompts :]
        prompts = [model.tokenizer(prompt).input_ids for prompt in wanted_prompts]
        found[name] = record(model, prompts, options.max_new_tokens, options.seed if law == "coupled" else None)
    if options.recordings is not None:
        stored = {name: [list(vars(text).values()) for text in texts] for name, texts in found.items()}
        options.recordings.write_text(json.dumps(stored), encoding="utf-8")
    return found


@torch.inference_mode()
def calibrated(batch_sizes: Sequence[int], repeats: int = 7) -> Costs:
    """Costs of the arithmetic trio's forwards on this machine, by rows and width; lines between measured widths."""
    model = ProxyTunedModel.demo("arithmetic")
    seconds: dict[tuple[str, int], list[float]] = {}
    for rows in batch_sizes:
        for role, one in (("base", model.base), ("expert", model.expert), ("anti_expert", model.anti_expert)):
            runner = Runner(one, role, rows)
            with borrowed([one]):
                runner.cache.reserve(64 + max(WIDTHS))
                runner.prefill(0, [list(range(1, 64))] * rows)
                seconds[role, rows] = [_median_seconds(runner, rows, width, repeats) for width in WIDTHS]

    def forward(role: str, rows: int, width: int) -> float:
        nearest = min(batch_sizes, key=lambda size: (abs(size - rows), size))
        own = seconds[role, nearest]
        i = max(1, next((i for i, known in enumerate(WIDTHS) if known >= width), len(WIDTHS) - 1))
        share = (width - WIDTHS[i - 1]) / (WIDTHS[i] - WIDTHS[i - 1])
        return (own[i - 1] + share * (own[i] - own[i - 1])) * rows / nearest

    own = 0.1 * seconds["expert", batch_sizes[0]][0]
    return Costs(forward, lambda rows, width: own * (1 + 0.2 * (width - 1)), listening=0.2 * own)


def _median_seconds(runner: Runner, rows: int, width: int, repeats: int) -> float:
    tokens = torch.ones(rows, width, dtype=torch.long)
    found = []
    for _ in range(repeats + 2):
        began = perf_counter()
        runner.forward(tokens)
        found.append(perf_counter() - began)
    return median(found[2:])


def _wall(text: str, options: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding for real, the settings taking turns: medians of tokens per second over per-step's."""
    model = ProxyTunedModel.demo(text)
    prompts = [model.tokenizer(prompt, return_tensors="pt").input_ids for prompt in demo_prompts(text, 4)]
    settings: list[Any] = [0, 2, 4, 8, "auto"]
    rates: dict[Any, list[float]] = {count: [] for count in settings}
    for repeat in range(6):
        for count in settings if repeat % 2 else settings[::-1]:
            began, tokens = perf_counter(), 0
            for ids in prompts:
                output: Any = model.generate(ids, max_new_tokens=options.max_new_tokens, num_draft_tokens=count)
                tokens += output.shape[1] - ids.shape[1]
            if repeat:  # the first round warms up
                rates[count].append(tokens / (perf_counter() - began))
    return {"text": text, "over_per_step": {str(n): median(own) / median(rates[0]) for n, own in rates.items()}}


def _bars(result: dict[str, Any]) -> dict[str, Any]:
    """The least of what is promised, over all cases."""
    cases = result["cases"]
    idle = [case for case in cases if case["text"].startswith("random") and case["best_fixed"] == 0]
    bars = {
        "least auto over best fixed": min(case["auto_over_best_fixed"] for case in cases),
        "least auto without stops over best fixed": min(case["auto_without_stops_over_best_fixed"] for case in cases),
        "cases with auto under 0.95 of the best fixed": sum(case["auto_over_best_fixed"] < 0.95 for case in cases),
        "least auto over per-step": min(case["auto_over_per_step"] for case in cases),
        "least share of per-step cycles, where an adversarial expert makes per-step best": min(
            (case["per_step_share"] for case in idle), default=None
        ),
    }
    if "turning" in result:
        cycles = [case["cycles_to_recover"] for case in result["turning"]]
        bars["most cycles until it has recovered"] = None if None in cycles else max(cycles)
    return bars


def _print(result: dict[str, Any]) -> None:
    console = Console(stderr=True, width=140)
    table = Table(title="auto against fixed numbers of drafts, virtual clock")
    for i, name in enumerate(
        ("text", "batch", "costs", "best fixed", "over per-step", "auto / best", "without stops", "auto / per-step")
    ):
        table.add_column(name, justify="left" if i in (0, 2) else "right")
    table.add_column("per-step cycles", justify="right")
    for case in result["cases"]:
        table.add_row(
            case["text"],
            str(case["batch"]),
            case["costs"],
            str(case["best_fixed"]),
            f"{case['best_fixed_over_per_step']:.2f}",
            f"{case['auto_over_best_fixed']:.3f}",
            f"{case['auto_without_stops_over_best_fixed']:.3f}",
            f"{case['auto_over_per_step']:.3f}",
            f"{case['per_step_share']:.0%}",
        )
    console.print(table)
    for name, rate in result["acceptance"].items():
        console.print(f"{name}: accepted / drafted {rate:.2f} with four drafts")
    for wall in result.get("wall", []):
        console.print(f"{wall['text']}, wall clock over per-step: {wall['over_per_step']}")
    for name, value in result["bars"].items():
        console.print(f"{name}: {value if value is None or isinstance(value, int) else round(value, 3)}")


def _plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Speed over per-step of auto and of fixed windows, a panel for each text."""
    require_matplotlib()
    from matplotlib import pyplot

    texts = list(dict.fromkeys(case["text"] for case in cases))
    figure, panels = pyplot.subplots(1, len(texts), figsize=(4 * len(texts), 4), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for case in (case for case in cases if case["text"] == text):
            fixed = case["fixed_over_per_step"]
            (line,) = panel.plot(list(fixed), list(fixed.values()), label=f"{case['costs']}, batch {case['batch']}")
            panel.axhline(case["auto_over_per_step"], color=line.get_color(), linestyle=":")
        panel.set_title(text)
        panel.set_xlabel("drafts a cycle; dotted: auto")
    panels[0][0].set_ylabel("speed over per-step")
    panels[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
