"""Keys and values of rows that have ended, kept for prompts that begin alike.

A position's keys and values depend on the tokens up to it alone, so a copy of a common prefix is what a prefill would
have made, up to rounding. Every role reads its own prompt and is matched by itself. Knows nothing of requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from specproxy.cache import RaggedCache

__all__ = ["Place", "PrefixStore", "common_length"]

_LEAST = 8  # shorter prefixes are read again: nearly every text shares a few leading tokens with another

Copies = list[tuple[Tensor, Tensor]]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # slices compare at the speed of C: few long comparisons beat many short ones
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class _Entry:
    tokens: dict[str, list[int]]
    copies: dict[str, Copies]

    @property
    def positions(self) -> int:
        """Of its longest role."""
        return max(map(len, self.tokens.values()))

    def covers(self, tokens: dict[str, list[int]]) -> bool:
        """Whether every role's sequence here begins with the one given."""
        return all(self.tokens[role][: len(given)] == given for role, given in tokens.items())


class Place(NamedTuple):
    """A row of a model's cache."""

    cache: RaggedCache
    slot: int


class Match(NamedTuple):
    """A role's longest known prefix: its length, and what gives it."""

    length: int
    entry: int | None = None  # in the store
    slot: int | None = None  # a row of the caches


class PrefixStore:
    """Prefixes, the least recently used of which give way.

    Args:
        max_positions: kept in all; an entry counts with its longest role.
    """

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self.positions = 0  # kept at present
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, places: Mapping[str, Place], tokens: dict[str, list[int]]) -> None:
        """Copy a row.

        Args:
            places: per role, where it stands.
            tokens: per role, the tokens whose keys and values are there, from the first on.
        """
        if not _LEAST <= max(map(len, tokens.values())) <= self.max_positions:
            return
        for number, entry in list(self._entries.items()):
            if entry.covers(tokens):
                self._entries.move_to_end(number)
                return
            if all(common_length(entry.tokens[role], tokens[role]) == len(entry.tokens[role]) for role in tokens):
                self._drop(number)  # the new one begins with all of it
        copies = {role: place.cache.export(place.slot, len(tokens[role])) for role, place in places.items()}
        entry = self._entries[self._next] = _Entry({role: list(given) for role, given in tokens.items()}, copies)
        self.positions += entry.positions
        self._next += 1
        while self.positions > self.max_positions:
            self._drop(next(iter(self._entries)))

    def _drop(self, number: int) -> None:
        self.positions -= self._entries.pop(number).positions

    def restore(
        self, places: Mapping[str, Place], prompts: dict[str, list[int]], rows: Sequence[dict[str, list[int]]]
    ) -> dict[str, int]:
        """Begin a row with what is known of its prompts.

        Args:
            places: per role, where it goes: a slot that is empty, and not among `rows`.
            prompts: per role; the last token of each is left out, since it opens the row's first window.
            rows: for the leading slots of the caches, which tokens they hold, per role.

        Returns:
            Per role, how many leading positions are there now.
        """
        found: dict[str, int] = {}
        for role, prompt in prompts.items():
            match = self._find(role, prompt[:-1], rows)
            cache, slot = places[role]
            if match.slot is not None:
                cache.move(match.slot, slot, match.length)
            elif match.entry is not None:
                cache.restore(slot, self._entries[match.entry].copies[role], match.length)
                self._entries.move_to_end(match.entry)
            found[role] = match.length
        return found

    def _find(self, role: str, prompt: list[int], rows: Sequence[dict[str, list[int]]]) -> Match:
        best = Match(0)
        for number, entry in self._entries.items():
            length = common_length(entry.tokens[role], prompt)
            if length >= max(_LEAST, best.length + 1):
                best = Match(length, entry=number)
        for slot, tokens in enumerate(rows):
            length = common_length(tokens[role], prompt)
            if length >= max(_LEAST, best.length + 1):
                best = Match(length, slot=slot)
        return best
