"""The policy that learns: who drafts and how many tokens, for the most expected tokens a second.

Over the rows in flight, with S_r(i) the estimated probability that the first i drafts of row r all survive and T(G) the
estimated time of a cycle, it maximises over G

    sum over r of (1 + S_r(1) + ... + S_r(G))  /  T(G)

    T(G)  =  G e + (1 - product over r of (1 - S_r(G))) e + b(G + 1) + o(G + 1)

where e is an expert step, b(W) the windows of all other models and o(W) the loop's own time: all of them measured
(`specproxy.costs`), as S is (`specproxy.forecast`). Where forwards cannot be timed one by one, or overlap, T(G) itself
is what is measured.

A batch has one window: rows with a shorter one of their own would save nothing, since its forwards run over all rows.

While nothing is drafted, acceptance is heard all the same: such a cycle has the expert's logits at its position anyway,
so every few of them a plan `listens`: it asks whether the expert's draft there would have been accepted.

Source: Leviathan et al. 2023, arXiv 2211.17192, section 3.3, with measured acceptance by row and position in place of a
constant, and the costs of proxy-tuning's cycle.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from specproxy.costs import CostTable
from specproxy.forecast import Forecast
from specproxy.policy import CycleReport, Outlook, Plan

__all__ = ["AutoPolicy"]

_EXPERT = "expert"
#: Numbers of drafts considered: each is a capture of its own where cycles are captured, and neighbours differ little.
_COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_FIRST = (4, 0, 4)  # drafts of the first cycles: two widths make a line, and a first cycle is often a slow one
_STALE = 16, 128  # cycles after which drafting, or per-step, is measured once more: at first, and in the end
_GAIN = 0.02  # by which a window must promise more than the present one; per-step needs none
_LISTEN_EVERY = 2  # per-step cycles
_BEST_DRAFTING = -1  # stands for the best number of drafts above none
_REFRESH_EVERY = 8  # cycles after which estimated times are made anew


@dataclass
class _Choice:
    """Times of the cycles of one drafter, for one number of rows, by number of drafts."""

    seconds: Any  # float64 [n], without the expert's step at the bonus position
    bonus: float  # seconds of that step, where it runs only when reached


class AutoPolicy:
    """Follows measured acceptance and measured times.

    It can serve one call after another: what it knows of times and of acceptance over all rows stays.

    Args:
        most: largest number of drafts considered.
    """

    def __init__(self, most: int = _COUNTS[-1]) -> None:
        self._costs = CostTable()
        self._expert = Forecast(most)
        self._scorers: set[str] = set()  # roles that run once a cycle, over the whole window
        self._overlaps = False  # whether forwards cannot be told apart by their times
        self._bonus_always = False  # whether the bonus step runs without being reached
        self._bonus_is_shared = False  # whether the expert's last position is part of another model's forward
        self._choices: dict[int, _Choice] = {}
        self._age = 0
        self._counts = np.array([count for count in _COUNTS if count <= most])
        self._present = _FIRST[0]
        self._cycles = 0
        self._stale = _STALE[0]
        self._with_drafts = self._without_drafts = 0  # cycles since one of the other kind

    def start(self) -> None:
        """Begin another call: its rows are new ones."""
        self._expert.keep(())

    def plan(self, outlook: Outlook) -> Plan:
        """The window with the most expected tokens a second."""
        choice = self._choice(len(outlook.rows))
        counts = self._counts[self._counts <= outlook.most]
        if choice is None:
            return self._count_plan(min(_FIRST[0], outlook.most), None)
        survival = self._expert.survival(outlook.rows)  # [rows, positions]
        limits = np.array(outlook.useful)[:, None]
        useful = np.where(np.arange(survival.shape[1]) < limits, survival, 0)
        tokens = np.concatenate([[0.0], useful.sum(0).cumsum()])[counts] + len(outlook.rows)
        reached = np.concatenate([[0.0], 1 - (1 - survival).prod(0)])[counts]  # a per-step cycle has no further step
        seconds = choice.seconds[: len(counts)] + reached * choice.bonus
        rates = tokens / seconds
        due = self._due()
        if due is None:
            best = self._settle(counts, rates)
            self._present = int(counts[best])
        elif due == _BEST_DRAFTING and len(counts) > 1:
            best = int(rates[1:].argmax()) + 1
        else:
            best = int(np.searchsorted(counts, due, side="right")) - 1
        return self._count_plan(int(counts[best]), (float(tokens[best]), float(seconds[best])))

    def _due(self) -> int | None:
        """Drafts of a cycle that is run to be measured; None where there is no need."""
        if self._cycles < len(_FIRST):
            return _FIRST[self._cycles]
        if max(self._with_drafts, self._without_drafts) < self._stale:
            return None
        self._stale = min(2 * self._stale, _STALE[1])
        return 0 if self._with_drafts else _BEST_DRAFTING

    def _count_plan(self, count: int, expected: tuple[float, float] | None) -> Plan:
        listens = count == 0 and self._without_drafts % _LISTEN_EVERY == 0
        return Plan(count, listens=listens, expected=expected)

    def _settle(self, counts: Any, rates: Any) -> int:
        """Index of the best count, or of the present one where it is not enough worse to leave it."""
        best = int(rates.argmax())
        present = int(np.searchsorted(counts, self._present))
        if present == len(counts) or counts[present] != self._present or counts[best] == 0:
            return best
        return best if rates[best] > rates[present] * (1 + _GAIN) else present

    def _choice(self, rows: int) -> _Choice | None:
        """Estimated times for so many rows; None before anything was measured."""
        choice = self._choices.get(rows)
        if choice is not None:
            return choice
        counts = self._counts
        whole = [self._costs.seconds("cycle", rows, count + 1) for count in counts.tolist()]
        if whole[0] is None:
            return None
        step = self._costs.seconds(_EXPERT, rows, 1)
        if self._overlaps or step is None:
            choice = _Choice(np.array(whole), 0.0)
        else:
            steps = counts if self._bonus_is_shared else np.maximum(counts + self._bonus_always, 1)
            seconds = steps * step + [self._windows(rows, count + 1) for count in counts.tolist()]
            choice = _Choice(seconds, 0.0 if self._bonus_always or self._bonus_is_shared else step)
        # A wider window is never cheaper, which shows a single spike for what it is.
        choice.seconds = np.minimum.accumulate(choice.seconds[::-1])[::-1]
        self._choices[rows] = choice
        return choice

    def _windows(self, rows: int, width: int) -> float:
        """Seconds of all models that score a window, and of the loop itself."""
        parts = [self._costs.seconds(role, rows, width) for role in ("own", *self._scorers)]
        return sum(part for part in parts if part is not None)

    def observe(self, report: CycleReport) -> None:
        """Take a cycle's acceptance and times into account."""
        rows, width = len(report.rows), report.plan.num_drafts + 1
        if report.plan.num_drafts:
            fates = zip(report.rows, report.num_drafts, report.num_accepted, strict=True)
            self._expert.hear(fates)
        elif report.heard:
            self._expert.hear([(row, 1, int(heard)) for row, heard in zip(report.rows, report.heard, strict=True)])
        is_new = self._costs.add("cycle", rows, width, report.seconds)
        in_forwards = sum(forward.seconds for forward in report.forwards)
        self._overlaps |= in_forwards > report.seconds
        steps = 0
        for role, count, forward_width, seconds in report.forwards:
            is_new |= self._costs.add(role, count, forward_width, seconds)
            if role == _EXPERT:
                steps += 1
            else:
                self._scorers.add(role)
        if report.forwards:
            is_new |= self._costs.add("own", rows, width, max(0.0, report.seconds - in_forwards))
        reached = any(kept == count for kept, count in zip(report.num_accepted, report.num_drafts, strict=True))
        if report.plan.num_drafts and steps > report.plan.num_drafts and not reached:
            self._bonus_always = True
        is_chain = report.plan.drafter == _EXPERT and report.plan.tree is None
        if report.forwards and is_chain and reached and steps <= report.plan.num_drafts:
            self._bonus_is_shared = True
        self._cycles += 1
        drafted = report.plan.num_drafts > 0
        self._with_drafts = self._with_drafts + 1 if drafted else 0
        self._without_drafts = 0 if drafted else self._without_drafts + 1
        self._age += 1
        if is_new or self._age >= _REFRESH_EVERY:
            self._age = 0
            self._choices.clear()
        self._forget(report.rows)

    def _forget(self, rows: tuple[Hashable, ...]) -> None:
        if self._expert.num_rows > 2 * len(rows) + 64:
            self._expert.keep(rows)
