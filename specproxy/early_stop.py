"""Where a draft stops early, by the entropy of the laws that it is drawn from.

After the drafter's forward at window position i its law there is known, and so is the law's entropy, before a token is
drawn from it. Among all lengths n >= i that the draft may still take, the one is aimed at with the largest

    sum over rows r of S_r(1) + ... + S_r(n)  -  R * T(n)

with S_r(j) the estimated probability that the row's first j drafts all survive, R the tokens a second that the batch is
expected to give, and T(n) the time of what is still to be run. n = i draws no draft at position i, and the law there
serves the token behind the drafts; n = i + 1 draws one more and stops.

A batch has one window, so one length: shorter drafts of single rows would save nothing.

Source of the idea: Zhang et al. 2024 (SVIP), arXiv 2411.18462, where a draft stops at a threshold of the square root of
the entropy. Here acceptance by entropy is learnt, and the threshold follows from it and from measured times. Knows
nothing of tokens or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["EarlyStop", "EntropyOdds"]

_EDGES = (0.03, 0.1, 0.3, 0.7, 1.2, 2.0, 3.0, 4.0, 5.0)  # nats, between classes of entropy
_KEPT = 0.995  # what a cycle leaves of the earlier trials
_WEIGHT = 12.0  # trials that the assumption counts for that entropy tells nothing
_LEAST, _GREATEST = 0.005, 0.995
_GAIN = 0.05  # tokens a row by which a length must promise more than the planned one: estimates are no surer


@dataclass(frozen=True, eq=False)
class EarlyStop:
    """Decides for one cycle how long its draft gets, from the entropies as they come.

    Args:
        acceptance: float64 [rows, n], probability that a draft survives where those before it did and its entropy is
            not known; 0 where a row has no use for it.
        expected: float64 [rows, n], the same as `EntropyOdds.expected` has it, for entropies that are known.
        factors: float64 [classes], by which an entropy's class multiplies these odds.
        windows: float64 [n + 1], seconds of all but the drafter's forwards, by drafts.
        step: seconds of a forward of the drafter.
        rate: R, tokens a second.
        planned: drafts of a cycle that knew no entropy, 0 .. n.
    """

    acceptance: Any
    expected: Any
    factors: Any
    windows: Any
    step: float
    rate: float
    planned: int

    @property
    def most(self) -> int:
        """The longest draft."""
        return len(self.windows) - 1

    def length(self, entropies: Sequence[Sequence[float]]) -> int:
        """The length to aim at.

        Args:
            entropies: i + 1 of every row, in nats, behind as many forwards of the drafter.

        Returns:
            n, i .. `most`: i draws nothing from the last law, i + 1 draws once more and stops there, more goes on.
        """
        known = np.array(entropies, dtype=float)
        done = known.shape[1]
        chances = self.acceptance.copy()
        chances[:, :done] = _given(self.expected[:, :done], self.factors, known)
        survival = chances.cumprod(axis=1)
        counts = np.arange(done - 1, self.most + 1)
        tokens = np.concatenate([[0.0], survival.sum(0).cumsum()])[counts]
        # Behind a law that nothing was drawn from the drafter need not step for the bonus position.
        reached = np.concatenate([[0.0], 1 - (1 - survival[:, done - 1 :]).prod(0)])
        seconds = self.windows[counts] + (np.maximum(counts, done) + reached) * self.step
        worth = tokens - self.rate * seconds
        if self.planned >= counts[0] and worth.max() - worth[self.planned - counts[0]] < _GAIN * len(known):
            return self.planned
        return int(counts[worth.argmax()])


class EntropyOdds:
    """How a law's entropy changes the odds that a draft from it survives: over all rows, by classes of entropy."""

    def __init__(self) -> None:
        self._trials = np.zeros(len(_EDGES) + 1)
        self._right = np.zeros(len(_EDGES) + 1)
        self._expected = np.zeros(len(_EDGES) + 1)

    @staticmethod
    def expected(acceptance: Any, rate: float) -> Any:
        """Probabilities that the entropy is held against, [rows, n]; 0 stays 0.

        That a row fares well is in good part that its entropies are low. So as not to count that twice, its odds are
        drawn half of the way (geometrically) to those over all rows.

        Args:
            acceptance: whatever the entropies, float64 [rows, n].
            rate: over all rows.
        """
        odds = np.sqrt(_odds(acceptance) * _odds(np.array(rate)))
        return odds / (1 + odds)

    def hear(self, drafts: Iterable[tuple[float, bool, float]]) -> None:
        """Take one cycle's drafts into account.

        Args:
            drafts: (entropy of the law in nats, whether the draft survived, `expected` of it) of every draft that was
                put to the test.
        """
        for total in (self._trials, self._right, self._expected):
            total *= _KEPT
        for entropy, survived, chance in drafts:
            place = int(np.digitize(entropy, _EDGES))
            self._trials[place] += 1
            self._right[place] += survived
            self._expected[place] += chance

    def factors(self) -> Any:
        """float64 [classes]: seen odds over expected odds, drawn towards 1."""
        trials = np.maximum(self._trials, 1e-9)
        mean = (self._expected / trials).clip(_LEAST, _GREATEST)
        seen = ((self._right + mean) / (self._trials + 1)).clip(_LEAST, _GREATEST)
        offsets = np.log(seen / (1 - seen) * (1 - mean) / mean)
        return np.exp(self._trials * offsets / (self._trials + _WEIGHT))

    def given(self, expected: float, entropy: float) -> float:
        """Probability that a draft survives whose law has an entropy, in nats."""
        return float(_given(np.array(expected), self.factors(), np.array(entropy)))


def _odds(chances: Any) -> Any:
    chances = np.minimum(chances, _GREATEST)
    return chances / (1 - chances)


def _given(expected: Any, factors: Any, entropies: Any) -> Any:
    """Probabilities with their odds changed by the classes of entropies of the same shape; an entropy that is not a
    number belongs to the highest class."""
    odds = _odds(expected) * factors[np.digitize(entropies, _EDGES)]
    return odds / (1 + odds)
