"""What `specproxy generate --stats` prints: who proposed each token, how drafts fared, how fast it was.

Knows statistics, pieces of text and rich; neither models nor the command line's options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specproxy.stats import DRAFT, TARGET, SpeculationStats

__all__ = ["Comparison", "print_report"]

STYLES = {DRAFT: "green", TARGET: "bold magenta"}
BAR_WIDTH = 24  # cells of a bar at 100 %


@dataclass(frozen=True)
class Comparison:
    """Tokens per second of one call and of per-step decoding, pairwise from interleaved repeats.

    Args:
        speculative: tokens/s of each repeat under the settings asked for.
        per_step: tokens/s of the repeat of `num_draft_tokens=0` beside it.
        same_tokens: whether both gave the same tokens; None where only their law is the same.
    """

    speculative: list[float]
    per_step: list[float]
    same_tokens: bool | None

    @property
    def ratio(self) -> float:
        """Median of the pairwise ratios."""
        return median(ours / theirs for ours, theirs in zip(self.speculative, self.per_step, strict=True))


def print_report(
    console: Console, prompt: str, pieces: Sequence[str], stats: SpeculationStats, comparison: Comparison | None
) -> None:
    """Print one row's text coloured by the source of each token, then its statistics.

    Args:
        console: where to.
        prompt: text of the prompt.
        pieces: text of each new token.
        stats: the call's statistics; its first row of `token_sources` belongs to `pieces`.
        comparison: timing against per-step decoding; None where the call was per-step itself.
    """
    text = Text().append(prompt, style="dim")
    for piece, source in zip(pieces, stats.token_sources[0], strict=True):
        text.append(piece, style=STYLES[source])
    console.print(text, soft_wrap=True)
    console.print()
    console.print(_legend(stats))
    console.print(_summary(stats, comparison))
    if stats.drafted_per_position:
        console.print(_positions(stats, bar="█" if console.encoding.startswith("utf") else "#"))


def _legend(stats: SpeculationStats) -> Text:
    sources = stats.token_sources[0]
    legend = Text("new tokens: ")
    for number, (source, meaning) in enumerate(((DRAFT, "drafted and accepted"), (TARGET, "from the target"))):
        legend.append(", " if number else "")
        legend.append(f"{sources.count(source)} {meaning}", style=STYLES[source])
    return legend


def _summary(stats: SpeculationStats, comparison: Comparison | None) -> Table:
    table = Table(show_header=False)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    rate = f"{stats.acceptance_rate:.1%} ({stats.num_accepted_tokens} of {stats.num_draft_tokens})"
    table.add_row("acceptance rate", rate if stats.num_draft_tokens else "nothing drafted")
    table.add_row("mean acceptance length, bonus included", f"{stats.mean_acceptance_length:.2f} tokens a cycle")
    table.add_row(
        "mean acceptance length, without bonus", f"{stats.mean_acceptance_length_without_bonus:.2f} tokens a cycle"
    )
    table.add_row("cycles", str(stats.num_cycles))
    if stats.expected["seconds"]:
        for drafter, windows in sorted(stats.windows.items()):
            counts = ", ".join(f"{cycles} with {count}" for count, cycles in sorted(windows.items()))
            table.add_row(f"windows of the {drafter}", counts)
        table.add_row("cycles without drafts", str(stats.num_per_step_cycles))
        stops = stats.entropy_stops
        if any(stops.values()):
            ends = (
                f"{stops['shorter']} shorter than planned, {stops['as_planned']} as planned, {stops['longer']} longer"
            )
            table.add_row("cycles whose drafts entropy ended", ends)
        table.add_row("predicted by the policy", f"{stats.expected_tokens_per_second:.1f} tokens/s")
        table.add_row("realised in those cycles", f"{stats.realised_tokens_per_second:.1f} tokens/s")
    if comparison is not None:
        table.add_row("speed", f"{median(comparison.speculative):.1f} tokens/s")
        table.add_row("per-step speed, same run", f"{median(comparison.per_step):.1f} tokens/s")
        repeats = len(comparison.speculative)
        table.add_row(f"median ratio, {repeats} pairs timed", f"{comparison.ratio:.2f} times per-step")
        if comparison.same_tokens is not None:
            table.add_row("same tokens as per-step", "yes" if comparison.same_tokens else "no")
    return table


def _positions(stats: SpeculationStats, bar: str) -> Table:
    table = Table(title="acceptance by draft position", title_justify="left")
    table.add_column("position", justify="right")
    table.add_column("accepted", width=BAR_WIDTH)
    table.add_column("", justify="right")
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    for position, (accepted, drafted) in enumerate(pairs, start=1):
        share = accepted / drafted if drafted else 0.0
        table.add_row(str(position), bar * round(share * BAR_WIDTH), f"{share:.0%} of {drafted}")
    return table
