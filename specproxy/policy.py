"""How many tokens to draft in the next cycle. A pure function of what it is told, so that it can be replayed.

It may look at laws, costs and past acceptance, never at a token it would then discard: that would bias `rejection` and
`block`.

With acceptance a, expert step e, base and anti-expert over W positions b(W), the policy maximises over G

    tokens a second  =  (1 - a^(G+1)) / (1 - a)  /  (G e + b(G + 1) + a^G e)

Source: Leviathan et al. 2023, arXiv 2211.17192, section 3.3, with the costs of proxy-tuning's cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["AdaptiveWindow", "CycleReport", "FixedWindow", "WindowPolicy"]


@dataclass(frozen=True)
class CycleReport:
    """What a cycle cost and gave.

    Args:
        num_drafts: G of the cycle.
        drafted, accepted: drafts verified up to the first refusal, and drafts accepted, summed over rows.
        expert_seconds: mean time of one expert step; 0.0 where none ran.
        window_seconds: time of base and anti-expert over the window.
    """

    num_drafts: int
    drafted: int
    accepted: int
    expert_seconds: float
    window_seconds: float


class WindowPolicy(Protocol):
    """Chooses G before a cycle and hears of it afterwards."""

    def num_drafts(self) -> int:
        """Drafts for the next cycle."""
        ...

    def observe(self, report: CycleReport) -> None:
        """Take a finished cycle into account."""
        ...


class FixedWindow:
    """Always the same number of drafts.

    Args:
        count: drafts per cycle; 0 is per-step decoding.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def num_drafts(self) -> int:
        """The fixed number."""
        return self._count

    def observe(self, report: CycleReport) -> None:
        """Nothing to learn."""


class AdaptiveWindow:
    """Follows decayed acceptance and measured costs; starts by drafting, and tries again after a while without drafts.

    Args:
        first: drafts of the first cycle.
        most: largest number of drafts considered.
    """

    _DECAY = 0.9  # per cycle: acceptance follows the last ten cycles or so
    _COST_DECAY = 0.7
    _PRIOR_DRAFTS, _PRIOR_ACCEPTANCE = 2.0, 0.7
    _SLOPE = 0.1  # assumed cost of one more window position, relative to a window of one, until measured
    _PROBE_EVERY = 32  # cycles without drafts before one is tried again

    def __init__(self, first: int = 4, most: int = 8) -> None:
        self._first, self._most = first, most
        self._drafted = self._accepted = 0.0
        self._expert_seconds: float | None = None
        self._window_seconds: dict[int, float] = {}
        self._idle = 0

    @property
    def acceptance(self) -> float:
        """Running probability that a draft is accepted, given that those before it were."""
        drafts = self._drafted + self._PRIOR_DRAFTS
        return min((self._accepted + self._PRIOR_DRAFTS * self._PRIOR_ACCEPTANCE) / drafts, 0.999)

    def num_drafts(self) -> int:
        """The number of drafts with the most expected tokens a second."""
        if self._expert_seconds is None or not self._window_seconds:
            return self._first
        best = max(range(self._most + 1), key=self.rate)
        if best == 0 and self._idle >= self._PROBE_EVERY:
            return 1
        return best

    def rate(self, count: int) -> float:
        """Expected tokens a second and row with `count` drafts."""
        assert self._expert_seconds is not None
        a = self.acceptance
        tokens = (1 - a ** (count + 1)) / (1 - a)
        return tokens / ((count + a**count) * self._expert_seconds + self._window_cost(count + 1))

    def _window_cost(self, window: int) -> float:
        if window in self._window_seconds:
            return self._window_seconds[window]
        nearest = min(self._window_seconds, key=lambda measured: (abs(measured - window), measured))
        seconds = self._window_seconds[nearest]
        return seconds * (1 + self._SLOPE * (window - 1)) / (1 + self._SLOPE * (nearest - 1))

    def observe(self, report: CycleReport) -> None:
        """Fold a cycle's acceptance and costs into the running figures."""
        self._idle = 0 if report.num_drafts else self._idle + 1
        if report.num_drafts:
            self._drafted = self._drafted * self._DECAY + report.drafted
            self._accepted = self._accepted * self._DECAY + report.accepted
        window = report.num_drafts + 1
        before = self._window_seconds.get(window, report.window_seconds)
        self._window_seconds[window] = before + (1 - self._COST_DECAY) * (report.window_seconds - before)
        if report.expert_seconds > 0:
            expert = report.expert_seconds if self._expert_seconds is None else self._expert_seconds
            self._expert_seconds = expert + (1 - self._COST_DECAY) * (report.expert_seconds - expert)
