"""What speculation did during a call. Knows nothing of models: it is told of every cycle."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["DRAFT", "TARGET", "DrafterStats", "SpeculationStats"]

DRAFT, TARGET = "draft", "target"


@dataclass
class DrafterStats:
    """What one drafter did, counted as in `SpeculationStats`.

    Args:
        num_cycles: windows that it was asked for, counted once per row, whether or not it had drafts for the row.
        num_draft_tokens: its drafts that were verified.
        num_accepted_tokens: its drafts that became output.
    """

    num_cycles: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class SpeculationStats:
    """Counts of one call, over all its rows. Nothing after a row's end (EOS, budget) is counted.

    Args:
        num_cycles: verified windows, counted once per row that took part.
        num_draft_tokens: drafts that were verified; of a tree, its levels: that many could have been accepted.
        num_accepted_tokens: drafts that became output.
        num_new_tokens: tokens of output.
        num_tree_tokens: nodes of token trees that were verified, whatever a row's budget left of use.
        num_empty_residuals: refusals whose residual had no mass (rounding) and fell back to the target law.
        accepted_per_position: how often the draft at each window position became output.
        drafted_per_position: how often a draft at each window position was verified.
        windows: how many cycles had each number of drafts, by drafter; under "tree" each number of drafted nodes. A
            cycle counts once, whatever its rows.
        num_per_step_cycles: cycles without drafts.
        entropy_stops: cycles whose number of drafts was decided by the expert's entropy: how many were "shorter" than
            planned, how many "as_planned" and "longer".
        expected: what the policy predicted, "tokens" and "seconds", over the cycles for which it did.
        realised: what those cycles gave and took.
        drafters: the counts of each drafter that took part, by name; per-step cycles are nobody's.
        token_sources: per row and new token, "draft" (proposed by the drafter and accepted) or "target" (residual or
            bonus).
        seconds: time of the call: "total", forwards of "expert", "anti_expert" (where there is one) and "base", and
            "other", the rest.
        kernels: what computed drafts and acceptance, "triton" or "torch".
    """

    num_cycles: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_new_tokens: int = 0
    num_tree_tokens: int = 0
    num_empty_residuals: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    windows: dict[str, dict[int, int]] = field(default_factory=dict)
    num_per_step_cycles: int = 0
    entropy_stops: dict[str, int] = field(default_factory=lambda: {"shorter": 0, "as_planned": 0, "longer": 0})
    expected: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "seconds": 0.0})
    realised: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "seconds": 0.0})
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    token_sources: list[list[str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    kernels: str = "torch"

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0.0 where nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """New tokens per cycle and row, the residual or bonus token included."""
        return self.num_new_tokens / self.num_cycles if self.num_cycles else 0.0

    @property
    def mean_acceptance_length_without_bonus(self) -> float:
        """Accepted drafts per cycle and row."""
        return self.num_accepted_tokens / self.num_cycles if self.num_cycles else 0.0

    def record(
        self, num_drafted: int, num_accepted: int, num_emitted: int, num_nodes: int = 0, drafter: str | None = None
    ) -> None:
        """Count one row's cycle.

        Args:
            num_drafted: drafts that were verified for the row.
            num_accepted: leading drafts that survived.
            num_emitted: tokens that became output, after the cut at a row's end; at most num_accepted + 1.
            num_nodes: drafted nodes of the cycle's tree, if it has one.
            drafter: who was asked; None in a per-step cycle.
        """
        cut_short = num_emitted <= num_accepted
        counted = min(num_drafted, num_emitted) if cut_short else num_drafted
        accepted = min(num_accepted, num_emitted)
        self.num_cycles += 1
        self.num_tree_tokens += num_nodes
        self.num_draft_tokens += counted
        self.num_accepted_tokens += accepted
        self.num_new_tokens += num_emitted
        if drafter is not None:
            own = self.drafters.setdefault(drafter, DrafterStats())
            own.num_cycles += 1
            own.num_draft_tokens += counted
            own.num_accepted_tokens += accepted
        missing = counted - len(self.drafted_per_position)
        if missing > 0:
            self.drafted_per_position += [0] * missing
            self.accepted_per_position += [0] * missing
        for i in range(counted):
            self.drafted_per_position[i] += 1
        for i in range(accepted):
            self.accepted_per_position[i] += 1

    def record_cycle(
        self, drafter: str, num_drafts: int, expected: tuple[float, float] | None, realised: tuple[float, float]
    ) -> None:
        """Count a cycle of all rows.

        Args:
            drafter: who drafted.
            num_drafts: planned, of a row at most; of a tree its nodes.
            expected: tokens of all rows and seconds, as the policy predicted them; None where it did not.
            realised: the same as they came.
        """
        if num_drafts == 0:
            self.num_per_step_cycles += 1
        else:
            own = self.windows.setdefault(drafter, {})
            own[num_drafts] = own.get(num_drafts, 0) + 1
        if expected is not None:
            for total, (tokens, seconds) in ((self.expected, expected), (self.realised, realised)):
                total["tokens"] += tokens
                total["seconds"] += seconds

    def record_stop(self, beyond: int) -> None:
        """Count a cycle whose drafting was free to stop early, by how many drafts it got beyond the planned number."""
        self.entropy_stops["shorter" if beyond < 0 else "longer" if beyond else "as_planned"] += 1

    @property
    def expected_tokens_per_second(self) -> float:
        """As the policy predicted it; 0.0 without predictions."""
        return _rate(self.expected)

    @property
    def realised_tokens_per_second(self) -> float:
        """Of the cycles for which there were predictions; 0.0 without."""
        return _rate(self.realised)

    def to_dict(self) -> dict[str, Any]:
        """All counts and rates as JSON-ready values."""
        return {
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "mean_acceptance_length_without_bonus": self.mean_acceptance_length_without_bonus,
            "num_cycles": self.num_cycles,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_new_tokens": self.num_new_tokens,
            "num_tree_tokens": self.num_tree_tokens,
            "num_empty_residuals": self.num_empty_residuals,
            "accepted_per_position": list(self.accepted_per_position),
            "drafted_per_position": list(self.drafted_per_position),
            "windows": {
                drafter: {str(count): cycles for count, cycles in sorted(own.items())}
                for drafter, own in self.windows.items()
            },
            "num_per_step_cycles": self.num_per_step_cycles,
            "entropy_stops": dict(self.entropy_stops),
            "expected_tokens_per_second": self.expected_tokens_per_second,
            "realised_tokens_per_second": self.realised_tokens_per_second,
            "drafters": {name: asdict(counts) for name, counts in self.drafters.items()},
            "token_sources": [list(sources) for sources in self.token_sources],
            "seconds": dict(self.seconds),
            "kernels": self.kernels,
        }


def _rate(total: dict[str, float]) -> float:
    return total["tokens"] / total["seconds"] if total["seconds"] else 0.0
