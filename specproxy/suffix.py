"""Texts of token ids in which the longest repeated suffix is always known: a suffix automaton, grown token by token.

Appending costs amortised constant time, and so does following another text through the automaton. Knows ids alone:
neither rows nor models.

Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text", Theoretical Computer Science
40; used for drafts in "SAM Decoding", arXiv 2411.10666.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import NamedTuple

from specproxy.errors import ConfigurationError

__all__ = ["Cursor", "LookupCorpus", "SuffixAutomaton"]

_SEPARATOR = -1  # between the texts of a corpus: no id, so that no match reaches over it


class Cursor(NamedTuple):
    """A place in an automaton: the state that holds the matched string, and the string's length."""

    state: int = 0
    length: int = 0


class SuffixAutomaton:
    """A text and all of its substrings.

    A state stands for the substrings that end at the same places; its link is the longest shorter suffix of them that
    ends at further places. The link of the whole text's state is therefore the longest suffix that occurred earlier.

    Args:
        tokens: the text to begin with.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._transitions: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of a state's longest substring
        self._end = [-1]  # where an occurrence of its substrings ends
        self._last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Lengthen the text by a token."""
        position = len(self.tokens)
        self.tokens.append(token)
        before = self._last
        if before:
            # From now on the suffix matched before has ended here too; a later place is the better guide.
            self._end[self._link[before]] = position - 1
        new = self._last = self._add(length=self._length[before] + 1, link=0, end=position, transitions={})
        state = before
        while state != -1 and token not in self._transitions[state]:
            self._transitions[state][token] = new
            state = self._link[state]
        if state == -1:
            return
        target = self._transitions[state][token]
        if self._length[target] != self._length[state] + 1:
            target = self._split(state, token, target)
        self._link[new] = target

    def _add(self, length: int, link: int, end: int, transitions: dict[int, int]) -> int:
        self._transitions.append(transitions)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1

    def _split(self, state: int, token: int, target: int) -> int:
        """Give those substrings of `target` that end here as well, which `state` and `token` lead to, their own."""
        own = self._add(self._length[state] + 1, self._link[target], self._end[target], dict(self._transitions[target]))
        while state != -1 and self._transitions[state].get(token) == target:
            self._transitions[state][token] = own
            state = self._link[state]
        self._link[target] = own
        return own

    def repeated(self) -> Cursor:
        """The text's longest suffix that occurs earlier in it (the two may overlap)."""
        state = max(self._link[self._last], 0)
        return Cursor(state, self._length[state])

    def advance(self, cursor: Cursor, token: int) -> Cursor:
        """The longest suffix of the cursor's string and `token` that occurs in the text."""
        state, length = cursor
        while self._link[state] != -1 and length <= self._length[self._link[state]]:
            state = self._link[state]  # split since the cursor was made
        while state and token not in self._transitions[state]:
            state = self._link[state]
            length = self._length[state]
        if token not in self._transitions[state]:
            return Cursor()
        return Cursor(self._transitions[state][token], length + 1)

    def continuation(self, cursor: Cursor, count: int, further: Sequence[int] | None = None) -> list[int]:
        """What followed an earlier occurrence of the cursor's string, up to a separator.

        Args:
            cursor: of this automaton.
            count: tokens at most.
            further: what stands behind the text, unknown to the automaton, and is itself followed by the continuation,
                so that a period goes on over the text's end; None ends the continuation with the text.
        """
        tokens: list[int] = []
        position = self._end[cursor.state] + 1
        size = len(self.tokens)
        tail = list(further or ())
        while len(tokens) < count:
            if position < size:
                token = self.tokens[position]
            elif further is not None and position - size < len(tail):
                token = tail[position - size]
            else:
                break
            if token == _SEPARATOR:
                break
            tokens.append(token)
            tail.append(token)
            position += 1
        return tokens


class LookupCorpus:
    """Texts from which lookup may copy beside a row's own: earlier outputs, or documents that outputs will quote.

    Shared by any number of rows, calls and threads. The oldest texts are forgotten: once it is full, between half of
    `max_tokens` and all of them are remembered.

    Args:
        max_tokens: tokens at most, at least 2; a text that is longer than half of it is remembered by its end.

    Raises:
        ConfigurationError: `max_tokens` is below 2 or no integer.

    Example:
        >>> corpus = LookupCorpus()
        >>> corpus.add([5, 6, 7, 8])
        >>> len(corpus)
        4
    """

    def __init__(self, max_tokens: int = 1_000_000) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
            raise ConfigurationError(f"max_tokens={max_tokens!r} must be an integer of at least 2: give more room.")
        self._half = max_tokens // 2
        self.lock = Lock()  # to hold while `shelves` are read
        self.shelves = (SuffixAutomaton(), SuffixAutomaton())  # the older one, and the one that is being filled
        self._counts = [0, 0]

    def __len__(self) -> int:
        return sum(self._counts)

    def add(self, tokens: Iterable[int]) -> None:
        """Remember a text.

        Args:
            tokens: token ids of the shared vocabulary.

        Raises:
            ConfigurationError: an entry is negative or no integer.
        """
        text = [int(token) for token in tokens][-self._half :]
        if any(token < 0 for token in text):
            raise ConfigurationError(f"tokens holds {min(text)}; give token ids.")
        with self.lock:
            if self._counts[1] + len(text) > self._half:
                self.shelves = (self.shelves[1], SuffixAutomaton())
                self._counts = [self._counts[1], 0]
            for token in [*text, _SEPARATOR]:
                self.shelves[1].append(token)
            self._counts[1] += len(text)
