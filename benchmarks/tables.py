"""Tables and a chart of a latency record. Knows the record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["plot", "print_tables", "require_matplotlib"]

_WIDTH = 150  # where the output is no terminal


def print_tables(console: Console, record: dict[str, Any]) -> None:
    """Per batch size a table of speeds, one of the cycle, and one of the theory."""
    if not console.is_terminal:
        console = Console(stderr=True, width=_WIDTH)
    for batch in record["batches"]:
        console.print(_speeds(batch))
        console.print(_cycles(batch))
        if batch["theory"]:
            console.print(_theory(batch))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _speeds(batch: dict[str, Any]) -> Table:
    title = f"batch size {batch['batch_size']}, c = {_number(batch['cost_ratio'], 3)}"
    table = Table(title=title)
    table.add_column("way of decoding", no_wrap=True)
    references = list(next(iter(batch["decoders"].values()))["over"])
    for name in ["tokens/s", "TTFT ms", "TPOT ms", "MiB", *(f"over {name}" for name in references)]:
        table.add_column(name, justify="right")
    for name, row in batch["decoders"].items():
        table.add_row(
            name,
            _number(row["tokens_per_second"], 1),
            _number(row["ttft_ms"], 1),
            _number(row["tpot_ms"]),
            _number(row["peak_memory_mib"], 0),
            *(_number(row["over"][reference]) for reference in references),
        )
    return table


def _cycles(batch: dict[str, Any]) -> Table:
    table = Table(title=f"batch size {batch['batch_size']}: ms of a mean cycle, and acceptance")
    table.add_column("way of decoding", no_wrap=True)
    columns = [
        "expert",
        "anti-expert",
        "base",
        "other",
        "forwards / total",
        "a",
        "rate",
        "tokens a cycle",
        "less bonus",
    ]
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in batch["decoders"].items():
        cycle, acceptance = row["cycle_ms"], row["acceptance"]
        drafted = acceptance is not None and acceptance["a"] is not None
        names = ("a", "rate", "mean_length", "mean_length_without_bonus")
        table.add_row(
            name,
            *(_number(cycle[part]) for part in ("draft", "anti_expert", "base", "other")),
            _number(row["forward_share"], 3),
            *(_number(acceptance[part] if drafted else None) for part in names),
        )
    return table


def _theory(batch: dict[str, Any]) -> Table:
    table = Table(title=f"batch size {batch['batch_size']}: what theory predicts at the measured a and c")
    names = ["", "a", "c", "G", "base window", "over", "measured", "predicted", "share", "at measured windows", "share"]
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i in (0, 5) else "right")
    for name, row in batch["theory"].items():
        for over in ("over_per_step", "over_base"):
            part = row[over]
            table.add_row(
                name,
                _number(row["a"], 3),
                _number(row["c"], 3),
                _number(row["num_drafts"], 1),
                _number(row["window_cost"]["base"]),
                over.removeprefix("over_").replace("_", "-"),
                *(_number(part[key]) for key in ("measured", "predicted", "share")),
                _number(part["predicted_at_measured_windows"]),
                _number(part["share_at_measured_windows"]),
            )
    return table


def require_matplotlib() -> Any:
    """matplotlib, drawing to files.

    Raises:
        ImportError: where it is missing, saying how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("charts need matplotlib; install it with: pip install 'specproxy[bench]'") from error
    matplotlib.use("Agg")
    return matplotlib


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a chart of tokens per second, one group of bars per batch size.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib import pyplot

    batches = record["batches"]
    figure, panels = pyplot.subplots(1, len(batches), figsize=(6 * len(batches), 4.5), squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        names = list(batch["decoders"])
        speeds = [batch["decoders"][name]["tokens_per_second"] for name in names]
        colours = ["tab:green" if name.startswith("draft_") else "tab:grey" for name in names]
        bars = panel.barh(names[::-1], speeds[::-1], color=colours[::-1])
        panel.bar_label(bars, fmt="%.0f", padding=3)
        panel.margins(x=0.15)
        panel.set_xlabel("tokens/s")
        panel.set_title(f"batch size {batch['batch_size']}, c = {_number(batch['cost_ratio'], 3)}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
