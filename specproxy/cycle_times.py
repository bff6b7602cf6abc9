"""What cycles take, put together from what their parts took: forwards by role, rows and width, and the loop's own time.

    T(G)  =  G e + P(bonus) e + b(G + 1) + o(G + 1)        the expert drafts G tokens
    T(G)  =  e(G + 1) + b(G + 1) + o(G + 1)                free drafts: the expert too runs over the window
    T     =  sum over levels of e(level) + b(N) + o(N)     the expert drafts a tree of N nodes, the root among them

with e(w) the expert over w positions, e = e(1), b(w) the windows of all other models and o(w) the loop itself. Where
forwards cannot be timed one by one, or run beside each other, whole cycles stand for their parts; so they do for
drafters whose forwards are not known beforehand.

Knows nothing of acceptance, models or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from specproxy.costs import CostTable
from specproxy.policy import CycleReport
from specproxy.tree import TreeShape

__all__ = ["ChainTimes", "CycleTimes"]

_EXPERT, _LOOKUP, _TREE = "expert", "lookup", "tree"
_REFRESH_EVERY = 8  # cycles after which estimates are made anew


@dataclass
class ChainTimes:
    """Times of the cycles of one drafter, for one number of rows, by number of drafts.

    Args:
        seconds: float64 [n], without the expert's step at the bonus position.
        bonus: seconds of that step, where it runs only when reached.
        windows: float64 [n], the share of all but the expert's steps in `seconds`, where its steps are known.
        step: seconds of one of these steps; None where they are not known, or the bonus step is not one by itself.
    """

    seconds: Any
    bonus: float
    windows: Any = None
    step: float | None = None


class CycleTimes:
    """Estimated times of cycles.

    Args:
        counts: numbers of drafts for which chains are estimated, ascending, 0 first.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self._counts = np.array(counts)
        self._costs = CostTable()
        self._scorers: set[str] = set()  # roles that run once a cycle, over the whole window
        self._is_whole = False  # whether only whole cycles tell
        self._bonus_always = False  # whether the bonus step runs without being reached
        self._bonus_is_shared = False  # whether the expert's last position is part of another model's forward
        self._chains: dict[tuple[str, int], ChainTimes] = {}
        self._trees: dict[tuple[TreeShape, int], float] = {}
        self._age = 0

    def hear(self, report: CycleReport) -> None:
        """Take a cycle's times into account."""
        plan, rows = report.plan, len(report.rows)
        name = _TREE if plan.tree is not None else plan.drafter if plan.num_drafts else _EXPERT
        width = max(
            (forward.width for forward in report.forwards if forward.role in self._scorers), default=plan.window
        )
        is_new = self._costs.add(f"cycle {name}", rows, width, report.seconds)
        in_forwards = sum(forward.seconds for forward in report.forwards)
        self._is_whole |= not report.forwards or in_forwards > report.seconds
        steps = 0
        for role, count, forward_width, seconds in report.forwards:
            is_new |= self._costs.add(role, count, forward_width, seconds)
            steps += role == _EXPERT
            if role != _EXPERT and name in (_EXPERT, _TREE):
                self._scorers.add(role)
        is_new |= self._costs.add(f"own {name}", rows, width, max(0.0, report.seconds - in_forwards))
        reached = any(kept == count for kept, count in zip(report.num_accepted, report.num_drafts, strict=True))
        if plan.stop is None and name == _EXPERT and plan.num_drafts and steps > plan.num_drafts and not reached:
            self._bonus_always = True
        if plan.stop is None and name == _EXPERT and report.forwards and reached and steps <= plan.num_drafts:
            self._bonus_is_shared = True
        self._age += 1
        if is_new or self._age >= _REFRESH_EVERY:
            self._age = 0
            self._chains.clear()
            self._trees.clear()

    def chain(self, drafter: str, rows: int) -> ChainTimes | None:
        """Times with chains of a drafter; None before anything was measured."""
        times = self._chains.get((drafter, rows))
        if times is None and "cycle expert" in self._costs:
            times = self._chains[drafter, rows] = self._chain(drafter, rows)
            # A wider window is never cheaper, which shows a single spike for what it is.
            times.seconds = np.minimum.accumulate(times.seconds[::-1])[::-1]
            if times.windows is not None:
                times.windows = np.minimum.accumulate(times.windows[::-1])[::-1]
        return times

    def _chain(self, drafter: str, rows: int) -> ChainTimes:
        widths = (self._counts + 1).tolist()
        step = self._costs.seconds(_EXPERT, rows, 1)
        if self._is_whole or step is None or drafter not in (_EXPERT, _LOOKUP):
            name = drafter if f"cycle {drafter}" in self._costs else _EXPERT
            whole = np.array([self._costs.seconds(f"cycle {name}", rows, width) for width in widths])
            whole[0] = self._costs.seconds("cycle expert", rows, 1)
            return ChainTimes(whole, 0.0)
        windows = np.array([self._windows(drafter if width > 1 else _EXPERT, rows, width) for width in widths])
        if drafter == _LOOKUP:
            return ChainTimes(windows + [self._costs.seconds(_EXPERT, rows, width) for width in widths], 0.0)
        steps = self._counts if self._bonus_is_shared else np.maximum(self._counts + self._bonus_always, 1)
        seconds = windows + steps * step
        if self._bonus_always or self._bonus_is_shared:
            return ChainTimes(seconds, 0.0)
        return ChainTimes(seconds, step, windows, step)

    def tree(self, shape: TreeShape, rows: int) -> float | None:
        """Seconds of a cycle with a tree, without the expert's step at a leaf that is reached; None as in `chain`."""
        seconds = self._trees.get((shape, rows))
        if seconds is None and "cycle expert" in self._costs:
            seconds = self._trees[shape, rows] = self._tree(shape, rows)
        return seconds

    def _tree(self, shape: TreeShape, rows: int) -> float:
        if self._is_whole:
            if "cycle tree" in self._costs:
                return self._sum([("cycle tree", len(shape))], rows)
            return self._sum([("cycle expert", shape.depth + 1)], rows)
        levels = shape.levels if self._bonus_always else shape.expanded
        work = [(_EXPERT, len(level)) for level in levels if level]
        return self._sum(work, rows) + self._windows(_TREE, rows, len(shape))

    def _windows(self, name: str, rows: int, width: int) -> float:
        """Seconds of all models that score a window, and of the loop itself."""
        own = f"own {name}" if f"own {name}" in self._costs else f"own {_EXPERT}"
        return self._sum([(own, width), *((role, width) for role in self._scorers)], rows)

    def _sum(self, work: list[tuple[str, int]], rows: int) -> float:
        parts = [self._costs.seconds(name, rows, width) for name, width in work]
        return sum(part for part in parts if part is not None)
