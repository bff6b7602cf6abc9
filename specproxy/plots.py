"""Charts of analyses and comparisons as PNG, by matplotlib (extra `bench`). Knows their figures, nothing of models."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from specproxy.errors import ConfigurationError

__all__ = ["analysis_charts", "comparison_chart", "require_matplotlib"]

LEAST_TEXTS = 3  # positions that fewer texts reach are left out: their means say little


def require_matplotlib() -> Any:
    """matplotlib's figures, drawn without a display.

    Raises:
        ConfigurationError: where it is missing, saying how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            f"charts need matplotlib ({error}); install it with: pip install 'specproxy[bench]'"
        ) from error
    return Figure


def analysis_charts(record: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG images by title.

    Args:
        record: `Analysis.to_dict()`.
    """
    charts = {
        "Departures by position": _positions(record, "departures", "share that departs from the base's choice"),
        "KL by position": _positions(record, "kl", "KL(target || base), nats"),
        "Kinds of tokens": _kinds(record["by_kind"]),
    }
    if any(record["drafted_per_position"]):
        charts["Acceptance by draft position"] = _acceptance(record)
    if record["cutoffs"]:
        charts["Correction dropped"] = _cutoffs(record["cutoffs"])
    return charts


def _figure(width: float = 6.4) -> tuple[Any, Any]:
    figure = require_matplotlib()(figsize=(width, 3.6), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _positions(record: Mapping[str, Any], name: str, label: str) -> bytes:
    figure, axes = _figure()
    least = min(LEAST_TEXTS, len(record["texts"]))
    rows = [row for row in record["by_position"] if row["count"] >= least]
    axes.plot([row["position"] for row in rows], [row[name] for row in rows], color="tab:purple", marker=".")
    axes.set(xlabel="new token", ylabel=label, ylim=(0, None))
    return _png(figure)


def _kinds(kinds: Mapping[str, Mapping[str, Any]]) -> bytes:
    figure, axes = _figure()
    names = [f"{kind} ({part['count']})" for kind, part in kinds.items()]
    bars = axes.barh(names[::-1], [part["departures"] for part in kinds.values()][::-1], color="tab:purple")
    axes.bar_label(bars, fmt="{:.0%}", padding=3)
    axes.set(xlabel="share of departures", xlim=(0, 1.1))
    return _png(figure)


def _acceptance(record: Mapping[str, Any]) -> bytes:
    figure, axes = _figure()
    pairs = zip(record["accepted_per_position"], record["drafted_per_position"], strict=True)
    shares = [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]
    bars = axes.bar(range(1, len(shares) + 1), shares, color="tab:green")
    axes.bar_label(bars, fmt="{:.0%}")
    axes.set(xlabel="place in the draft", ylabel="share accepted", ylim=(0, 1.1))
    return _png(figure)


def _cutoffs(cutoffs: Sequence[Mapping[str, Any]]) -> bytes:
    figure, axes = _figure()
    names = ["never" if cut["cutoff"] is None else str(cut["cutoff"]) for cut in cutoffs]
    for offset, (part, colour) in enumerate((("repetition", "tab:red"), ("endless", "tab:blue"))):
        places = [i + 0.4 * offset - 0.2 for i in range(len(names))]
        values = [cut[part]["value"] for cut in cutoffs]
        reach = [
            [value - cut[part]["low"] for value, cut in zip(values, cutoffs, strict=True)],
            [cut[part]["high"] - value for value, cut in zip(values, cutoffs, strict=True)],
        ]
        label = {"repetition": "4-grams that repeat", "endless": "texts without an end"}[part]
        axes.bar(places, values, 0.4, yerr=reach, color=colour, alpha=0.7, label=label, capsize=3)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="correction dropped after so many new tokens", ylabel="share", ylim=(0, 1.05))
    axes.legend()
    return _png(figure)


def comparison_chart(record: Mapping[str, Any]) -> bytes:
    """Scores of every way with their intervals, and beside them those of every alpha, as one PNG image.

    Args:
        record: `Comparison.to_dict()`.
    """
    figure = require_matplotlib()(figsize=(11 if record["sweep"] else 6.4, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if record["sweep"] else 1, squeeze=False)[0]
    _bars(left, record["ways"])
    for axes in right:
        alphas = list(record["sweep"])
        for scoring in ("strict", "lenient"):
            points = [record["sweep"][alpha][scoring] for alpha in alphas]
            values = [point["value"] for point in points]
            low, high = ([point[bound] for point in points] for bound in ("low", "high"))
            places = [float(alpha) for alpha in alphas]
            axes.plot(places, values, marker="o", label=scoring)
            axes.fill_between(places, low, high, alpha=0.2)
        axes.set(xlabel="alpha", ylabel="share right, 95 %", ylim=(0, 1))
        axes.legend()
    return _png(figure)


def _bars(axes: Any, ways: Mapping[str, Mapping[str, Any]]) -> None:
    for offset, scoring in enumerate(("strict", "lenient")):
        points = [way[scoring] for way in ways.values()]
        values = [point["value"] for point in points]
        reach = [
            [point["value"] - point["low"] for point in points],
            [point["high"] - point["value"] for point in points],
        ]
        places = [i + 0.4 * offset - 0.2 for i in range(len(points))]
        axes.bar(places, values, 0.4, yerr=reach, label=scoring, capsize=3, alpha=0.8)
    axes.set_xticks(range(len(ways)), [name.replace("_", " ") for name in ways], rotation=20)
    axes.set(ylabel="share right, 95 %", ylim=(0, 1))
    axes.legend()
