"""Who drafts in the next cycle, and how many tokens. A pure function of what it is told, so that it can be replayed.

It may look at laws, costs and past acceptance, never at a token it would then discard: that would bias `rejection` and
`block`.

With acceptance a, expert step e, base and anti-expert over W positions b(W), the policy maximises over G

    tokens a second  =  (1 - a^(G+1)) / (1 - a)  /  (G e + b(G + 1) + a^G e)

Source: Leviathan et al. 2023, arXiv 2211.17192, section 3.3, with the costs of proxy-tuning's cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from specproxy.costs import ForwardTime
from specproxy.tree import TreeShape

__all__ = ["AdaptiveWindow", "CycleReport", "FixedWindow", "Plan", "WindowPolicy"]


@dataclass(frozen=True)
class Plan:
    """What the next cycle does.

    Args:
        num_drafts: G, drafts of a row at most; 0 is a per-step cycle.
        drafter: who proposes them.
        tree: where equality decides, the tree that is drafted in place of a chain; its depth is `num_drafts`.
    """

    num_drafts: int
    drafter: str = "expert"
    tree: TreeShape | None = None

    def __post_init__(self) -> None:
        assert self.tree is None or self.tree.depth == self.num_drafts, "a tree's depth is the number of drafts"

    @property
    def window(self) -> int:
        """W: positions that the base and the anti-expert score."""
        return self.num_drafts + 1 if self.tree is None else len(self.tree)


@dataclass(frozen=True)
class CycleReport:
    """What a cycle cost and gave.

    Args:
        plan: as it was made.
        rows: the rows that took part, by their `index`.
        num_drafts: drafts of each that were verified.
        num_accepted: leading drafts of each that survived.
        forwards: time of every forward; none where they are not timed one by one.
        seconds: of the whole cycle.
        ranks: with a tree, the ranks of the accepted drafts of each row, by depth: a path in the plan's tree. Behind
            it the target's token was no guess of the node there, if that node has any and the row's budget left more.
    """

    plan: Plan
    rows: tuple[int, ...]
    num_drafts: tuple[int, ...]
    num_accepted: tuple[int, ...]
    forwards: tuple[ForwardTime, ...]
    seconds: float
    ranks: tuple[tuple[int, ...], ...] = ()


class WindowPolicy(Protocol):
    """Makes a plan before a cycle and hears of it afterwards."""

    def plan(self, rows: Sequence[int], most: int) -> Plan:
        """The next cycle of the rows in flight, by their `index`, with at most `most` drafts."""
        ...

    def observe(self, report: CycleReport) -> None:
        """Take a finished cycle into account."""
        ...


class FixedWindow:
    """Always the same number of drafts.

    Args:
        count: drafts per cycle; 0 is per-step decoding.
        drafter: who proposes them.
        tree: drafted in place of a chain; `count` is then its depth.
    """

    def __init__(self, count: int, drafter: str = "expert", tree: TreeShape | None = None) -> None:
        self._plan = Plan(count, drafter, tree)

    def plan(self, rows: Sequence[int], most: int) -> Plan:
        """The fixed number, as far as there is room."""
        count = min(self._plan.num_drafts, most)
        tree = None if self._plan.tree is None or count == 0 else self._plan.tree.cut(count)
        return replace(self._plan, num_drafts=count, tree=tree)

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

    def plan(self, rows: Sequence[int], most: int) -> Plan:
        """The number of drafts with the most expected tokens a second."""
        return Plan(min(self._num_drafts(), most))

    def _num_drafts(self) -> int:
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
        drafts = report.plan.num_drafts
        self._idle = 0 if drafts else self._idle + 1
        if drafts:
            pairs = zip(report.num_accepted, report.num_drafts, strict=True)
            self._drafted = self._drafted * self._DECAY + sum(min(kept + 1, count) for kept, count in pairs)
            self._accepted = self._accepted * self._DECAY + sum(report.num_accepted)
        steps = [forward.seconds for forward in report.forwards if forward.role == "expert"]
        window_seconds = sum(forward.seconds for forward in report.forwards if forward.role != "expert")
        before = self._window_seconds.get(drafts + 1, window_seconds)
        self._window_seconds[drafts + 1] = before + (1 - self._COST_DECAY) * (window_seconds - before)
        if steps:
            mean = sum(steps) / len(steps)
            expert = mean if self._expert_seconds is None else self._expert_seconds
            self._expert_seconds = expert + (1 - self._COST_DECAY) * (mean - expert)
