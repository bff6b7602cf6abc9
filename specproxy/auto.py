"""The policy that learns: who drafts, how many tokens or what tree, for the most expected tokens a second.

Over the rows in flight, with S_r(i) the estimated probability that the first i drafts of row r all survive
(`specproxy.forecast`) and T the estimated time of a cycle (`specproxy.cycle_times`), it maximises

    sum over r of (1 + S_r(1) + ... + S_r(G))  /  T(G)

over drafters and G, down to G = 0, which is per-step decoding, and where equality decides over token trees as well,
whose further nodes add the chance that the target's token is the expert's second guess, its third, ...

A batch has one window: rows with a shorter one of their own would save nothing, since its forwards run over all rows.

Where the loop can stop a draft without waiting for a device, the chain of a few rows has its length decided while it is
drafted, by the entropies of the expert's laws (`specproxy.early_stop`); G is then what it would have had without.

While nothing is drafted, acceptance is heard all the same: such a cycle has the expert's logits at its position anyway,
so every few of them a plan `listens`: it asks whether the expert's draft there would have been accepted. What lookup
offers is compared with the text that came, whoever drafted it, so that lookup is known without being tried.

Source: Leviathan et al. 2023, arXiv 2211.17192, section 3.3, with measured acceptance by row and position in place of a
constant, and the costs of proxy-tuning's cycle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from specproxy.cycle_times import CycleTimes
from specproxy.early_stop import EarlyStop, EntropyOdds
from specproxy.forecast import Forecast, RankForecast
from specproxy.policy import CycleReport, Outlook, Plan
from specproxy.tree import TYPICAL_RANK_ACCEPTANCE, TreeShape

__all__ = ["AUTO_DRAFTERS", "AutoPolicy"]

_EXPERT, _LOOKUP = "expert", "lookup"
#: Who may draft, where nobody is named.
AUTO_DRAFTERS = (_EXPERT, _LOOKUP)
#: Numbers of drafts considered: each is a capture of its own where cycles are captured, and neighbours differ little.
_COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_MOST = _COUNTS[-1]
#: Trees considered, as drafted nodes and depth, shaped for the nearest of a few acceptances.
_TREES = ((2, 1), (4, 2), (6, 3), (10, 4), (16, 5), (24, 7), (40, 9))
_LEVELS = (0.3, 0.45, 0.6, 0.75, 0.9)
_FIRST = (4, 0, 4)  # drafts of the first cycles: two widths make a line, and a first cycle is often a slow one
_STALE = 32, 128  # cycles after which drafting, or per-step, is measured once more: at first, and in the end
_GAIN = 0.02  # by which a plan must promise more than the present one; per-step needs none
# By which drafts must promise more than per-step, and to leave it: the best of many estimates is seldom what it seems.
_OVER_PER_STEP, _FROM_PER_STEP = 0.05, 0.08
_DOUBT = 2.0  # times may have been taken for this much longer than they are
_GAIN_OF_CAPTURE = 0.1  # by which a plan that has yet to be captured must promise more than one that has been
_LISTEN_EVERY = 2  # per-step cycles
_NEARLY = 0.9  # of the best rate
_LOOK_EVERY = 8  # cycles
_FEW_ROWS = 4  # of which a stop may make something: with more the entropies say much the same every time
_LIFT = 1.05  # what stopping early is taken to add to the rate that is planned without
_MATCHES = (4, 8)  # lengths of match from which lookup's offers count as better ones


@dataclass(frozen=True)
class _Option:
    """A plan, with what it promises for a cycle of all rows."""

    plan: Plan
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class AutoPolicy:
    """Follows measured acceptance and measured times.

    It can serve one call after another: what it knows of times and of acceptance over all rows stays.

    Args:
        drafters: who may draft, by name.
        trees: whether the expert may draft trees, where equality decides.
        captured: whether cycles are captured: then a plan has to be worth its capture before it is made.
        stops: whether the expert's drafts may be stopped early, where the loop can.
    """

    def __init__(
        self,
        drafters: tuple[str, ...] = AUTO_DRAFTERS,
        trees: bool = True,
        captured: bool = False,
        stops: bool = True,
    ) -> None:
        self._drafters = drafters
        self._captured = captured
        self._run: set[Plan] = set()  # plans that have been made
        self._has_trees = trees and _EXPERT in drafters
        self._stops = stops
        self._entropies = EntropyOdds()
        self._times = CycleTimes(_COUNTS)
        self._forecasts = {name: Forecast(_MOST) for name in {_EXPERT, *drafters}}
        self._ranks = RankForecast(len(TYPICAL_RANK_ACCEPTANCE))
        self._present: Plan | None = None
        self._without_lookup = 0  # cycles since lookup was the best or nearly so
        self._was_surprised = False  # whether the last cycle that listened heard that most drafts would have survived
        self._cycles = 0
        self._stale = _STALE[0]
        self._with_drafts = self._without_drafts = 0  # cycles since one of the other kind

    @property
    def offers_wanted(self) -> int:
        """See `WindowPolicy`. Where lookup has not served for a while, its offers are looked at now and then."""
        looks = self._without_lookup < _LOOK_EVERY or self._cycles % _LOOK_EVERY == 0
        return _MOST if _LOOKUP in self._drafters and looks else 0

    def start(self) -> None:
        """Begin another call: its rows are new ones."""
        for name, forecast in self._forecasts.items():
            if name != _LOOKUP:
                forecast.keep(())

    def plan(self, outlook: Outlook) -> Plan:
        """The cycle with the most expected tokens a second."""
        per_step = self._times.chain(_EXPERT, len(outlook.rows))
        if per_step is None:
            return Plan(min(_FIRST[min(self._cycles, 1)], outlook.most), self._drafters[0])
        idle = _Option(Plan(0), float(len(outlook.rows)), float(per_step.seconds[0]))
        options = [idle]
        for drafter in self._drafters:
            options += self._chains(drafter, outlook)
        due = self._due(options, outlook)
        best = due or self._settle(options)
        plan = best.plan
        is_time = self._was_surprised or self._without_drafts % _LISTEN_EVERY == 0
        listens = plan.num_drafts == 0 and _EXPERT in self._drafters and is_time
        stop = None
        if self._can_stop(outlook) and due is None and not listens and plan.drafter == _EXPERT and plan.tree is None:
            stop = self._stop(outlook, best)
        count = plan.num_drafts if stop is None else stop.most
        return Plan(count, plan.drafter, plan.tree, listens, expected=(best.tokens, best.seconds), stop=stop)

    def _can_stop(self, outlook: Outlook) -> bool:
        return self._stops and outlook.stops and _EXPERT in self._drafters and len(outlook.rows) <= _FEW_ROWS

    def _stop(self, outlook: Outlook, best: _Option) -> EarlyStop | None:
        """What decides the length of the expert's chain while it is drafted; None where nothing is to be decided."""
        times = self._times.chain(_EXPERT, len(outlook.rows))
        limits = np.array(outlook.useful)
        most = min(outlook.most, _MOST, int(limits.max()))
        if most < 1 or times is None or times.step is None:
            return None
        forecast = self._forecasts[_EXPERT]
        acceptance = np.where(np.arange(_MOST) < limits[:, None], forecast.acceptance(outlook.rows), 0)[:, :most]
        return EarlyStop(
            acceptance,
            self._entropies.expected(acceptance, forecast.rate),
            self._entropies.factors(),
            np.interp(np.arange(most + 1), _COUNTS, times.windows),
            times.step,
            best.rate * _LIFT,
            best.plan.num_drafts,
        )

    def _chains(self, drafter: str, outlook: Outlook) -> list[_Option]:
        """The best chain of a drafter beside the present one, and with the expert the best tree; both may be none."""
        times = self._times.chain(drafter, len(outlook.rows))
        assert times is not None
        limits = np.array(outlook.useful)
        keys: tuple[Any, ...] = outlook.rows
        if drafter == _LOOKUP:
            if len(outlook.offers) != len(outlook.rows):
                return []
            keys = tuple(_match_class(length) for length, _ in outlook.offers)
            limits = np.minimum(limits, [count for _, count in outlook.offers])
        survival = self._forecasts[drafter].survival(keys)  # [rows, positions]
        useful = np.where(np.arange(_MOST) < limits[:, None], survival, 0)
        # A window holds no more than the longest offer or budget, and no more than there is room for.
        most = min(outlook.most, max(int(limits.max(initial=0)), 0))
        counts = np.array(_COUNTS)
        counts = counts[(counts > 0) & (counts <= most)]
        if len(counts) == 0:
            return []
        tokens = useful.sum(0).cumsum()[counts - 1] + len(outlook.rows)
        reached = 1 - (1 - survival).prod(0)
        places = np.searchsorted(_COUNTS, counts)
        seconds = times.seconds[places] + reached[counts - 1] * times.bonus
        chosen = {int((tokens / seconds).argmax())}
        if self._present is not None and self._present.drafter == drafter and self._present.tree is None:
            chosen |= set(np.flatnonzero(counts == self._present.num_drafts).tolist())
        options = [_Option(Plan(int(counts[i]), drafter), float(tokens[i]), float(seconds[i])) for i in sorted(chosen)]
        if drafter == _EXPERT and self._has_trees and outlook.equality:
            options += self._trees(outlook, survival, useful, reached, times.bonus)
        return options

    def _trees(self, outlook: Outlook, survival: Any, useful: Any, reached: Any, bonus: float) -> list[_Option]:
        """The best tree, and the present one where it is another."""
        first = survival[:, 0]
        options: list[_Option] = []
        shapes = _shapes(float(min(_LEVELS, key=lambda level: abs(level - first.mean()))))
        if self._present is not None and self._present.tree is not None:
            shapes = (*shapes, self._present.tree)
        for shape in shapes:
            if shape.depth > outlook.most:
                continue
            seconds = self._times.tree(shape, len(outlook.rows))
            assert seconds is not None
            grid, gains = self._ranks.gains(shape)
            gain = np.interp(first, grid, gains)
            gain = np.where(np.array(outlook.useful) >= shape.depth, gain, 0)  # what a budget cuts off is no gain
            tokens = len(outlook.rows) + useful[:, : shape.depth].sum() + gain.sum()
            seconds += bonus * reached[shape.depth - 1]
            options.append(_Option(Plan(shape.depth, _EXPERT, shape), float(tokens), float(seconds)))
        present = [option for option in options if option.plan == self._present]
        return [max(options, key=lambda option: option.rate), *present] if options else []

    def _due(self, options: list[_Option], outlook: Outlook) -> _Option | None:
        """A cycle that is run to be measured; None where there is no need."""
        idle, *drafting = options
        if self._cycles < len(_FIRST):
            count = min(_FIRST[self._cycles], outlook.most)
            times = self._times.chain(self._drafters[0], len(outlook.rows))
            assert times is not None
            tokens = len(outlook.rows) + self._forecasts[self._drafters[0]].survival(outlook.rows)[:, :count].sum()
            seconds = float(times.seconds[_COUNTS.index(count)])
            return _Option(Plan(count, self._drafters[0]), float(tokens), seconds) if count else idle
        if max(self._with_drafts, self._without_drafts) < self._stale:
            return None
        self._stale = min(2 * self._stale, _STALE[1])
        if not drafting:
            return idle
        best = max(drafting, key=lambda option: option.rate)
        if self._with_drafts:
            return idle if _DOUBT * idle.rate > best.rate else None
        return best if _DOUBT * best.rate > idle.rate and best.tokens > (1 + _GAIN) * idle.tokens else None

    def _settle(self, options: list[_Option]) -> _Option:
        """The best option, or the present one, or per-step, where it is not enough worse to leave it."""
        idle, best = options[0], max(options, key=self._worth)
        chances = [option.rate for option in options if option.plan.drafter == _LOOKUP]
        self._without_lookup = 0 if max(chances, default=0.0) > _NEARLY * best.rate else self._without_lookup + 1
        present = next((option for option in options if option.plan == self._present), None)
        if present is not None and best.plan.num_drafts and self._worth(best) <= present.rate * (1 + _GAIN):
            best = present
        gain = _FROM_PER_STEP if present is idle else _OVER_PER_STEP
        if best.plan.num_drafts and self._worth(best) <= idle.rate * (1 + gain):
            best = idle
        self._present = best.plan
        return best

    def _worth(self, option: _Option) -> float:
        """The option's rate, less where its cycle has yet to be captured."""
        is_new = self._captured and option.plan.num_drafts and option.plan not in self._run
        return option.rate / (1 + _GAIN_OF_CAPTURE * is_new)

    def observe(self, report: CycleReport) -> None:
        """Take a cycle's acceptance and times into account."""
        plan = report.plan
        self._run.add(plan)
        self._times.hear(report)
        if plan.tree is not None:
            # What a chain would have had: the leading best guesses.
            accepted = [next((i for i, rank in enumerate(path) if rank), len(path)) for path in report.ranks]
            self._forecasts[_EXPERT].hear(zip(report.rows, report.num_drafts, accepted, strict=True))
            self._ranks.hear(plan.tree, report.ranks, report.num_drafts)
        elif plan.stop is not None:
            self._hear_stopped(report)
        elif plan.num_drafts and plan.drafter != _LOOKUP:
            fates = zip(report.rows, report.num_drafts, report.num_accepted, strict=True)
            self._forecasts[plan.drafter].hear(fates)
        elif report.heard:
            fates_heard = [(row, 1, int(heard)) for row, heard in zip(report.rows, report.heard, strict=True)]
            self._forecasts[_EXPERT].hear(fates_heard)
            self._was_surprised = 2 * sum(report.heard) > len(report.heard)
        if report.matched and _LOOKUP in self._forecasts:
            matched = [(_match_class(match.length), match.tested, match.agreed) for match in report.matched]
            self._forecasts[_LOOKUP].hear(matched)
        self._cycles += 1
        self._with_drafts = self._with_drafts + 1 if plan.num_drafts else 0
        self._without_drafts = 0 if plan.num_drafts else self._without_drafts + 1
        for name, forecast in self._forecasts.items():
            if name != _LOOKUP and forecast.num_rows > 2 * len(report.rows) + 64:
                forecast.keep(report.rows)

    def _hear_stopped(self, report: CycleReport) -> None:
        """Learn from a draft that was free to stop: how its drafts fared, and what its entropies had told."""
        forecast = self._forecasts[_EXPERT]
        expected = self._entropies.expected(forecast.acceptance(report.rows), forecast.rate)
        tested: list[tuple[float, bool, float]] = []
        dropped: list[tuple[int, int, float]] = []
        figures = zip(report.rows, report.num_drafts, report.num_accepted, report.entropies, expected, strict=True)
        for row, drafted, accepted, entropies, chances in figures:
            for i, entropy in enumerate(entropies):
                if i < drafted:
                    tested.append((entropy, i < accepted, float(chances[i])))
                elif i == drafted < _MOST:
                    dropped.append((row, i, self._entropies.given(float(chances[i]), entropy)))
        forecast.hear(zip(report.rows, report.num_drafts, report.num_accepted, strict=True))
        forecast.assume(dropped)
        self._entropies.hear(tested)


def _match_class(length: int) -> int:
    """Offers behind longer matches fare better: rows are told apart by that alone."""
    return sum(length >= least for least in _MATCHES)


@functools.cache
def _shapes(level: float) -> tuple[TreeShape, ...]:
    """Trees for an acceptance of the best guess; the other ranks share what is left as they typically do."""
    first, *others = TYPICAL_RANK_ACCEPTANCE
    ranks = (level, *(other * (1 - level) / (1 - first) for other in others))
    return tuple(TreeShape.best_tree(ranks, nodes, depth) for nodes, depth in _TREES)
