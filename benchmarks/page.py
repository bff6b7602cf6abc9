"""The page of `benchmarks/report.py` and its charts, from records alone: runs no model, measures nothing.

Everything that a record lacks is left out, and the page says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import plot, require_matplotlib
from specproxy.scoring import Estimate, proportion

__all__ = ["SCORINGS", "draw", "headline", "page"]

SCORINGS = ("strict", "lenient")
_ROLES = {"expert": "expert alone", "proxy-tuned": "proxy-tuned", "tuned-base": "base tuned directly"}
_COLUMNS = "way|tokens/s|over per-step|over plain loop|over base alone|accepted|tokens a cycle|forwards|same tokens"
_TUNING = "tuning"  # the chart of the seeds
_HEADLINES = {"arithmetic, base grown": "arithmetic", "python, base grown": "Python, the hard case"}


def page(record: dict[str, Any], tuning: dict[str, Any] | None, charts: Mapping[str, str]) -> str:
    """The report in Markdown.

    Args:
        record: steps of `benchmarks/report.py` by name.
        tuning: a record of `training.seeds`.
        charts: what `draw` returned.
    """
    parts = [
        "# Report",
        "Written by `python benchmarks/report.py`; do not edit. What the columns mean stands in "
        "[README.md](README.md), how the models were trained in [../training/README.md](../training/README.md).",
        "## In short",
        "\n".join(headline(record, tuning)),
        *_quality(record, tuning),
        *([f"![problems solved]({charts[_TUNING]})"] if _TUNING in charts else []),
        *_speed(record, charts),
        *_conditions(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(record: dict[str, Any], tuning: dict[str, Any] | None) -> list[str]:
    """The figures that stand in the project's README, a list item each."""
    lines = []
    if tuning is not None:
        strict, lenient = (tuning["summary"][scoring] for scoring in SCORINGS)
        solved = ", ".join(
            f"{what} {_percent(strict['pooled'][role])}" for role, what in _ROLES.items() if role in strict["pooled"]
        )
        lines.append(
            f"- **Quality**, embedded arithmetic trio, {len(tuning['seeds'])} seeds of the tuning run, "
            f"{tuning['num_test']} held-out problems, strict scoring, 95 % intervals: base {_percent(strict['base'])}, "
            f"{solved}."
        )
        if "gap_closed" in strict["pooled"]:
            closed, by_expert = (strict["pooled"][name] for name in ("gap_closed", "gap_closed_by_expert"))
            lines[-1] += (
                f" Proxy-tuning closes {_percent(closed)} of the base's gap to direct tuning with as many tokens, the "
                f"expert alone {_percent(by_expert)}{_of_fewer(closed, tuning)}."
            )
        base, tuned = lenient["base"], lenient["pooled"]["proxy-tuned"]
        brings = (
            "the format and right answers besides" if tuned["low"] > base["high"] else "the format, no right answers"
        )
        lines.append(
            f"- Lenient scoring, which takes the last number of any text, gives the untuned base {_percent(base)} and "
            f"proxy-tuning {_percent(tuned)}: what the pair brings is {brings}."
        )
    speeds = dict(_speeds(record))
    lines += [_speed_line(speeds[name], text) for name, text in _HEADLINES.items() if name in speeds]
    return lines or ["Nothing was measured yet."]


def _speed_line(batch: dict[str, Any], text: str) -> str:
    """The fastest way of drafting, against what it competes with."""
    name, best = max(_drafting(batch), key=lambda row: row[1]["tokens_per_second"])
    over = best["over"]
    alone = "".join(
        f", {over[other]:.2f} times {what}"
        for other, what in (
            ("plain_loop", "the plain loop of three models"),
            ("base_generate", "the untuned base alone under Transformers' `generate`"),
        )
        if other in over
    )
    return (
        f"- **Speed**, {text}, base grown until a small forward costs {batch['cost_ratio']:.2f} of its own, function "
        f"unchanged, greedy, one row: `{name}` runs {over['per_step']:.2f} times as fast as per-step "
        f"decoding{alone}; {best['acceptance']['rate']:.0%} of the drafts are accepted."
    )


def _quality(record: dict[str, Any], tuning: dict[str, Any] | None) -> list[str]:
    parts = []
    shipped = {
        name.removeprefix("quality "): step["result"]
        for name, step in _measured(record).items()
        if name.startswith("quality ")
    }
    if shipped or tuning is not None:
        parts.append("## Quality")
    if shipped:
        counts = {result["problems"] for result in shipped.values()}
        rows = [
            [
                law,
                *(proportion(_bits(result[scoring])).format() for scoring in SCORINGS),
                "-" if "alpha" not in result else f"{result['alpha']:g}",
                "-" if "acceptance_rate" not in result else f"{result['acceptance_rate']:.1%}",
            ]
            for law, result in shipped.items()
        ]
        parts += [
            f"The shipped models on {' or '.join(map(str, sorted(counts)))} held-out problems, greedy; per cent solved "
            "with 95 % intervals. The proxy-tuned answers come from `ProxyTunedModel.generate` with drafts.",
            _table(["law", "strict", "lenient", "alpha", "drafts accepted"], rows),
        ]
    if tuning is None:
        return parts
    for scoring in SCORINGS:
        summary = tuning["summary"][scoring]
        rows = [
            [f"seed {seed}", f"{tuning['seeds'][seed]['alpha']:g}", *_outcome(own)]
            for seed, own in summary["seeds"].items()
        ]
        rows.append(["all", "", *_outcome(summary["pooled"])])
        parts += [
            f"Several seeds of the tuning run, {scoring} scoring, per cent of {tuning['num_test']} held-out problems; "
            f"the base itself solves {_interval(summary['base'])}.",
            _table(["", "alpha", *_ROLES.values(), "over the expert", "gap closed", "by the expert"], rows),
        ]
    own = all(row["validation"] for row in tuning["seeds"].values())
    chosen = f"each seed's best on {tuning['num_validation']} validation problems" if own else "the same for all seeds"
    parts.append(
        f"{tuning['recipe']} Alpha is {chosen}. A seed's intervals are over problems, those of all seeds over seeds "
        "and problems."
    )
    pooled = tuning["summary"]["strict"]["pooled"]
    bars = [
        ("proxy-tuned, strict", pooled.get("proxy-tuned"), 0.3),
        ("over the expert alone", pooled.get("over_expert"), 0.2),
        ("share of the gap to direct tuning closed", pooled.get("gap_closed"), 0.7),
    ]
    rows = []
    for what, got, bar in bars:
        if got is not None:
            missed = bar - got["value"]
            interval = f"{_interval(got)}{_of_fewer(got, tuning)}"
            rows.append([what, f"{bar:.0%}", interval, "yes" if missed <= 0 else f"no, by {missed:.1%}"])
    return [*parts, _table(["what must be reached", "at least", "all seeds", "reached"], rows)]


def _outcome(own: dict[str, Any]) -> list[str]:
    names = (*_ROLES, "over_expert", "gap_closed", "gap_closed_by_expert")
    return [_interval(own[name]) if name in own else "-" for name in names]


def _of_fewer(figure: dict[str, Any], tuning: dict[str, Any]) -> str:
    """A word on a figure that not all seeds have."""
    count = figure["seeds"]
    return "" if count == len(tuning["seeds"]) else f" ({count} seed{'s' * (count > 1)})"


def _speed(record: dict[str, Any], charts: Mapping[str, str]) -> list[str]:
    parts = []
    for name, batch in _speeds(record):
        rows = []
        for way, row in batch["decoders"].items():
            acceptance = row["acceptance"]
            drafted = acceptance is not None and acceptance["a"] is not None
            same = row.get("same_tokens_as_per_step")
            over = [row["over"].get(other) for other in ("per_step", "plain_loop", "base_generate")]
            rows.append(
                [
                    f"`{way}`",
                    f"{row['tokens_per_second']:.1f}",
                    *("-" if ratio is None else f"{ratio:.2f}" for ratio in over),
                    f"{acceptance['rate']:.1%}" if drafted else "-",
                    f"{acceptance['mean_length']:.2f}" if drafted else "-",
                    f"{row['forward_share']:.1%}",
                    "-" if same is None else ("yes" if same else "no"),
                ]
            )
        ratio = (
            "" if batch["cost_ratio"] is None else f", a small forward costs {batch['cost_ratio']:.3f} of the base's"
        )
        parts += [
            f"### {name.capitalize()}",
            f"Batch size {batch['batch_size']}{ratio}.",
            _table(_COLUMNS.split("|"), rows),
            *([f"![{name}]({charts[name]})"] if name in charts else []),
        ]
    return ["## Speed", *parts] if parts else []


def _conditions(record: dict[str, Any]) -> list[str]:
    rows = []
    for name, step in record["steps"].items():
        about = [str(step["about"][what]) for what in ("time", "device", "threads", "torch")]
        rows.append([name, step["status"], f"{step['seconds']:.0f} s", *about])
    # Of an error its last line: the lines above name files of one machine.
    faults = [f"- {name}: {step['faults'][-1]}" for name, step in record["steps"].items() if step["faults"]]
    faults += [f"- {name}: not measured" for name in record.get("missing", []) if name not in record["steps"]]
    table = _table(["step", "outcome", "took", "at", "machine", "threads", "torch"], rows)
    return ["## Conditions", table if rows else "Nothing was run.", "\n".join(faults)]


def draw(folder: Path, record: dict[str, Any], tuning: dict[str, Any] | None) -> dict[str, str]:
    """Writes the charts.

    Returns:
        Names of the files in `folder`, by what they show.

    Raises:
        ImportError: without matplotlib.
    """
    charts = {}
    if tuning is not None:
        charts[_TUNING] = "report-quality.png"
        _draw_quality(folder / charts[_TUNING], tuning)
    for step, done in _measured(record).items():
        if step.startswith("speed "):
            name = step.removeprefix("speed ")
            charts[name] = f"report-{name.replace(',', '').replace(' ', '-')}.png"
            plot(done["result"], folder / charts[name])
    return charts


def _draw_quality(path: Path, tuning: dict[str, Any]) -> None:
    """Shares solved by every law, pooled bars with their intervals and a dot for each seed."""
    require_matplotlib()
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SCORINGS), figsize=(5 * len(SCORINGS), 3.6), sharey=True)
    for panel, scoring in zip(panels, SCORINGS, strict=True):
        summary = tuning["summary"][scoring]
        present = [role for role in _ROLES if role in summary["pooled"]]
        bars = {"base": summary["base"]} | {_ROLES[role]: summary["pooled"][role] for role in present}
        values = np.array([[bar["value"], bar["low"], bar["high"]] for bar in bars.values()]).T * 100
        errors = np.abs(values[1:] - values[0])
        colours = ["tab:green" if name == "proxy-tuned" else "tab:grey" for name in bars]
        panel.bar(range(len(bars)), values[0], yerr=errors, color=colours, capsize=4)
        for place, role in enumerate(present, start=1):
            dots = [100 * own[role]["value"] for own in summary["seeds"].values() if role in own]
            panel.plot([place] * len(dots), dots, "k.", markersize=5)
        panel.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name in bars])
        panel.set_title(f"{scoring} scoring")
    panels[0].set_ylabel("problems solved (%)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    """Steps that have figures; one that found faults has them too."""
    return {name: step for name, step in record["steps"].items() if step["result"]}


def _speeds(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name.removeprefix("speed "), batch)
        for name, step in _measured(record).items()
        if name.startswith("speed ")
        for batch in step["result"]["batches"]
    ]


def _drafting(batch: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in batch["decoders"].items() if name.startswith("draft_")]


def _bits(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


def _interval(figure: dict[str, Any]) -> str:
    return Estimate(figure["value"], figure["low"], figure["high"]).format()


def _percent(figure: dict[str, Any]) -> str:
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
