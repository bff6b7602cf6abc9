"""How many leading drafts will survive: estimates from how earlier ones fared. Knows nothing of tokens or models.

A row's rate is drawn in steps towards what is known better and less closely: its last few drafts towards its longer
past, that towards all rows, those towards a prior. A new row so starts from its neighbours. How acceptance changes
along a draft is alike in all rows and is learnt from them together: the odds of position i are the row's odds times a
factor of the position, from what was seen there against what the rows' rates let expect. That rows differ is so not
taken for a difference between positions, which easy rows alone reach.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterable, Sequence
from math import log
from typing import Any

import numpy as np

from specproxy.tree import TYPICAL_RANK_ACCEPTANCE, TreeShape

__all__ = ["Forecast", "RankForecast"]

_RECENT, _LONG = 0.93, 0.985  # what a trial leaves of the row's earlier ones
_POOL = 0.99  # what a cycle leaves of the earlier ones over all rows
_PRIOR = 0.7, 1.0  # acceptance, and the trials that it counts for
_POOL_WEIGHT, _LONG_WEIGHT, _POSITION_WEIGHT = 60.0, 16.0, 12.0  # trials that each coarser estimate counts for
_RANK_WEIGHT = 20.0  # trials that a typical share of a rank counts for
_GAINS_EVERY = 32  # cycles with trees after which their worth is reckoned anew
_GRID = np.linspace(0, 1, 21)
_LEAST, _GREATEST = 0.005, 0.995


class _Past:
    """Decayed trials and successes of one row: of its last drafts, and of its longer past."""

    def __init__(self) -> None:
        self.recent_trials = self.recent_kept = self.long_trials = self.long_kept = 0.0

    def add(self, trials: float, kept: float) -> None:
        recent, long = _RECENT**trials, _LONG**trials
        self.recent_trials = self.recent_trials * recent + trials
        self.recent_kept = self.recent_kept * recent + kept
        self.long_trials = self.long_trials * long + trials
        self.long_kept = self.long_kept * long + kept

    def rate(self, pool: float) -> float:
        past = (self.long_kept + _POOL_WEIGHT * pool) / (self.long_trials + _POOL_WEIGHT)
        return (self.recent_kept + _LONG_WEIGHT * past) / (self.recent_trials + _LONG_WEIGHT)


class Forecast:
    """Acceptance of one drafter.

    Args:
        positions: drafts of a row at most.
    """

    def __init__(self, positions: int) -> None:
        self._trials = np.zeros(positions)  # over all rows, by position, decayed
        self._kept = np.zeros(positions)
        self._expected = np.zeros(positions)  # what the rows' rates let expect of `_kept`
        self._past: dict[Hashable, _Past] = {}
        self._odds: Any = None

    def hear(self, drafts: Iterable[tuple[Hashable, int, int]]) -> None:
        """Take one cycle's drafts into account.

        Args:
            drafts: (key, drafted, accepted) for every row; rows without drafts tell nothing. The key is the row, or a
                class of rows that fare alike.
        """
        by_key: dict[Hashable, tuple[int, int]] = {}
        self._trials *= _POOL
        self._kept *= _POOL
        self._expected *= _POOL
        pool = self.rate
        for key, drafted, accepted in drafts:
            if drafted <= 0:
                continue
            tested = min(accepted + 1, drafted)
            self._trials[:tested] += 1
            self._kept[:accepted] += 1
            past = self._past.get(key)
            self._expected[:tested] += pool if past is None else past.rate(pool)
            trials, kept = by_key.get(key, (0, 0))
            by_key[key] = trials + tested, kept + accepted
        for key, (trials, kept) in by_key.items():
            self._past.setdefault(key, _Past()).add(trials, kept)
        self._odds = None

    def assume(self, drafts: Iterable[tuple[Hashable, int, float]]) -> None:
        """Take drafts into account that were dropped because they were unlikely to survive, as if they had been tested.

        Without them a rate would be that of likely drafts alone.

        Args:
            drafts: (key, position, probability that it would have survived) of drafts behind others that all survived.
        """
        pool = self.rate
        for key, position, chance in drafts:
            past = self._past.setdefault(key, _Past())
            self._trials[position] += 1
            self._kept[position] += chance
            self._expected[position] += past.rate(pool)
            past.add(1, chance)
        self._odds = None

    @property
    def rate(self) -> float:
        """Probability that a draft survives, given that those before it did: over all rows and positions."""
        prior, weight = _PRIOR
        return float((self._kept.sum() + weight * prior) / (self._trials.sum() + weight))

    def survival(self, keys: Iterable[Hashable]) -> Any:
        """Probability that the first i + 1 drafts all survive, float64 [rows, positions]; keys as in `acceptance`."""
        return self.acceptance(keys).cumprod(axis=1)

    def acceptance(self, keys: Iterable[Hashable]) -> Any:
        """Probability that draft i survives where those before it did, float64 [rows, positions].

        Args:
            keys: of the rows; unknown ones take the rate of all.
        """
        pool = self.rate
        if self._odds is None:
            self._odds = self._position_odds()
        past = (self._past.get(key) for key in keys)
        rates = np.array([pool if one is None else one.rate(pool) for one in past]).clip(_LEAST, _GREATEST)
        odds = (rates / (1 - rates))[:, None] * self._odds
        return odds / (1 + odds)

    def _position_odds(self) -> Any:
        """Factor of every position: seen odds over expected odds, each drawn towards the one before it."""
        offsets, before = [], 0.0
        figures = zip(self._trials.tolist(), self._kept.tolist(), self._expected.tolist(), strict=True)
        for trials, kept, expected in figures:
            if trials > 0:
                mean = min(max(expected / trials, _LEAST), _GREATEST)
                seen = min(max((kept + mean) / (trials + 1), _LEAST), _GREATEST)
                offset = log(seen / (1 - seen) * (1 - mean) / mean)
                before = (trials * offset + _POSITION_WEIGHT * before) / (trials + _POSITION_WEIGHT)
            offsets.append(before)
        return np.exp(offsets)

    @property
    def num_rows(self) -> int:
        """Rows that are remembered."""
        return len(self._past)

    def keep(self, keys: Collection[Hashable]) -> None:
        """Forget all rows but these; what they have taught about all rows stays."""
        self._past = {key: past for key, past in self._past.items() if key in keys}


class RankForecast:
    """Which guess is right where the best one is not: over all rows, from the paths that trees have taken.

    Args:
        ranks: guesses considered.
    """

    def __init__(self, ranks: int) -> None:
        left, shares = 1.0, []
        for chance in TYPICAL_RANK_ACCEPTANCE[:ranks]:
            shares.append(chance / left)
            left -= chance
        self._prior = np.array(shares)  # probability of each rank, given that none before it was right
        self._trials = np.zeros(ranks)
        self._right = np.zeros(ranks)
        self._gains: dict[TreeShape, Any] = {}
        self._age = 0

    def hear(self, tree: TreeShape, paths: Sequence[Sequence[int]], depths: Sequence[int]) -> None:
        """Take one cycle's walks into account.

        Args:
            tree: that was drafted.
            paths: of each row, the ranks of its accepted drafts.
            depths: of each row, the drafts that it had room for.
        """
        self._trials *= _POOL
        self._right *= _POOL
        guesses = _guesses(tree)
        for path, depth in zip(paths, depths, strict=True):
            node = 0
            for level in range(min(len(path) + 1, depth)):
                children = guesses[node]
                rank = path[level] if level < len(path) else None
                for tried in children:
                    if tried < len(self._trials) and (rank is None or tried <= rank):
                        self._trials[tried] += 1
                        self._right[tried] += tried == rank
                if rank is None:
                    break
                node = children[rank]
        self._age += 1
        if self._age % _GAINS_EVERY == 0:
            self._gains.clear()

    def gains(self, tree: TreeShape) -> tuple[Any, Any]:
        """Tokens that a tree gives beyond the chain of its depth, by the acceptance of the best guess.

        Returns:
            The acceptances, ascending, and the gain at each.
        """
        gains = self._gains.get(tree)
        if gains is None:
            shares = (self._right + _RANK_WEIGHT * self._prior) / (self._trials + _RANK_WEIGHT)
            left, chances = 1 - _GRID, [_GRID]
            for share in shares[1:]:
                chances.append(left * share)
                left = left * (1 - share)
            nothing = np.zeros_like(_GRID)
            reached = [np.ones_like(_GRID)]
            for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
                reached.append(reached[parent] * (chances[rank] if rank < len(chances) else nothing))
            chain = sum(_GRID**depth for depth in range(1, tree.depth + 1))
            gains = self._gains[tree] = sum(reached[1:], nothing) - chain
        return _GRID, gains


@functools.cache
def _guesses(tree: TreeShape) -> tuple[dict[int, int], ...]:
    """Of every node, its children by their rank."""
    return tuple({tree.ranks[child]: child for child in tree.children(node)} for node in range(len(tree)))
