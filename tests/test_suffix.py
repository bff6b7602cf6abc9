"""The suffix automaton and the corpus against scans of the text itself; the cost, counted in lines that run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specproxy.suffix
from specproxy import ConfigurationError, LookupCorpus
from specproxy.suffix import Cursor, SuffixAutomaton

TEXTS = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=24))


def occurrences(text: Sequence[int], string: Sequence[int]) -> list[int]:
    """Where `string` ends in `text`."""
    size = len(string)
    return [end for end in range(size - 1, len(text)) if list(text[end + 1 - size : end + 1]) == list(string)]


def longest_repeated_suffix(text: Sequence[int]) -> int:
    """Length of the longest suffix that ends before the text's end as well."""
    return max((n for n in range(len(text)) if n and occurrences(text[:-1], text[-n:])), default=0)


def longest_suffix_within(other: Sequence[int], text: Sequence[int]) -> int:
    """Length of the longest suffix of `other` that occurs in `text`."""
    return max((n for n in range(1, len(other) + 1) if occurrences(text, other[-n:])), default=0)


def copied(text: Sequence[int], end: int, count: int) -> list[int]:
    """What follows `end`, the copy itself counting as text."""
    whole = list(text)
    for _ in range(count):
        whole.append(whole[end + 1 + len(whole) - len(text)])
    return whole[len(text) :]


@settings(max_examples=80, deadline=None)
@given(TEXTS)
def test_the_longest_repeated_suffix(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for size, token in enumerate(text, start=1):
        automaton.append(token)
        prefix = text[:size]
        cursor = automaton.repeated()
        assert cursor.length == longest_repeated_suffix(prefix)
        if cursor.length:
            ends = occurrences(prefix[:-1], prefix[-cursor.length :])
            assert automaton.continuation(cursor, 5, ()) in [copied(prefix, end, 5) for end in ends]
            assert automaton.continuation(cursor, 5) in [prefix[end + 1 : end + 6] for end in ends]


@settings(max_examples=80, deadline=None)
@given(TEXTS, TEXTS, st.data())
def test_another_text_is_followed_while_the_automaton_grows(text: list[int], other: list[int], data: Any) -> None:
    """Growth splits states that a cursor points to."""
    automaton = SuffixAutomaton()
    cursor = Cursor()
    known = 0
    for size, token in enumerate(other, start=1):
        grown = data.draw(st.integers(known, len(text)))
        for new in text[known:grown]:
            automaton.append(new)
        known = grown
        before = cursor
        cursor = automaton.advance(before, token)
        # A match may lengthen by the new token alone: what the text had lacked before is not looked for again.
        assert cursor.length <= longest_suffix_within(other[:size], text[:known])
        string = other[size - min(before.length, size - 1) - 1 : size]
        assert cursor.length == longest_suffix_within(string, text[:known])
        if cursor.length:
            ends = occurrences(text[:known], other[size - cursor.length : size])
            assert automaton.continuation(cursor, 4) in [text[:known][end + 1 : end + 5] for end in ends]


@settings(max_examples=80, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 3), max_size=6))
def test_drafts_behind_the_text(text: list[int], drafts: list[int]) -> None:
    """The text is followed into drafts that it does not hold."""
    automaton = SuffixAutomaton(text)
    cursor = automaton.repeated()
    for size, token in enumerate(drafts, start=1):
        known = text + drafts[: size - 1]
        string = [*known[len(known) - cursor.length :], token]
        cursor = automaton.advance(cursor, token)
        assert cursor.length == longest_suffix_within(string, text)
    if cursor.length:
        whole = text + drafts
        ends = [end for end in occurrences(text, whole[-cursor.length :]) if end + 1 < len(whole)]
        assert automaton.continuation(cursor, 5, drafts) in [copied(whole, end, 5) for end in ends]


def test_a_later_place_is_followed() -> None:
    """a b 1, a b 2, a b: the second place is nearer."""
    automaton = SuffixAutomaton([7, 8, 1, 7, 8, 2, 7, 8])
    assert automaton.repeated().length == 2
    assert automaton.continuation(automaton.repeated(), 3) == [2, 7, 8]


def test_a_period_goes_on_over_the_end_of_the_text() -> None:
    automaton = SuffixAutomaton([5, 6, 7] * 3)
    assert automaton.repeated().length == 6
    assert automaton.continuation(automaton.repeated(), 8, ()) == [5, 6, 7, 5, 6, 7, 5, 6]


def fibonacci(size: int) -> list[int]:
    """The Fibonacci word, whose substrings repeat as long and as unevenly as they can."""
    text, before = [0, 1], [0]
    while len(text) < size:
        text, before = text + before, text
    return text[:size]


HARD = {
    "one letter": lambda size: [0] * size,
    "a period": lambda size: [0, 1, 2] * (size // 3),
    "all but one letter": lambda size: [*[0] * (size // 2), 1, *[0] * (size // 2)],
    "Fibonacci": fibonacci,
    "all different": lambda size: list(range(size)),
    "a random walk": lambda size: [(k * k * 2654435761 >> 7) % 5 for k in range(size)],
}


def lines_run(work: Callable[[], Any]) -> int:
    """Lines of `specproxy.suffix` that run."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != specproxy.suffix.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("name", HARD)
def test_growing_and_following_take_linear_work(name: str) -> None:
    """Work a token stays the same from 200 tokens to 2,000, and so do the transitions that are kept (or copied)."""
    costs = []
    for size in (200, 2_000):
        text = HARD[name](size)
        automaton = SuffixAutomaton()

        def grow(automaton: SuffixAutomaton = automaton, text: list[int] = text) -> None:
            cursor, other = Cursor(), SuffixAutomaton(text[::2])
            for token in text:
                automaton.append(token)
                automaton.repeated()
                cursor = other.advance(cursor, token)

        costs.append(lines_run(grow) / len(text))
        assert sum(map(len, automaton._transitions)) < 3 * len(text)
        assert len(automaton._link) <= 2 * len(text)
    assert costs[1] < 1.2 * costs[0] < 120


def test_the_count_of_lines_sees_quadratic_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of all earlier places in every step, and the count is ten times that of a text a tenth as long."""

    def repeated(automaton: SuffixAutomaton) -> None:
        SuffixAutomaton.continuation(automaton, Cursor(), len(automaton.tokens))

    costs = []
    for size in (100, 1_000):
        automaton = SuffixAutomaton([0] * size)
        costs.append(lines_run(lambda automaton=automaton: repeated(automaton)))
    assert costs[1] > 8 * costs[0]


def followed(corpus: LookupCorpus, text: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Per shelf the length of the match of `text`, and what follows it."""
    found = []
    for shelf in corpus.shelves:
        cursor = Cursor()
        for token in text:
            cursor = shelf.advance(cursor, token)
        found.append((cursor.length, shelf.continuation(cursor, 9) if cursor.length else []))
    return found


def test_no_match_reaches_over_two_texts() -> None:
    corpus = LookupCorpus()
    corpus.add([1, 2, 3])
    corpus.add([4, 5])
    assert followed(corpus, [3, 4])[1] == (1, [5])
    assert followed(corpus, [1, 2, 3])[1] == (3, [])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=30), st.integers(2, 40))
def test_a_corpus_is_bounded_and_keeps_the_latest(texts: list[list[int]], most: int) -> None:
    corpus = LookupCorpus(most)
    remembered: list[list[int]] = []
    for text in texts:
        corpus.add(text)
        remembered.append(text[-(most // 2) :])
        assert len(corpus) <= most
        assert max(length for length, _ in followed(corpus, remembered[-1])) == len(remembered[-1])
    latest: list[list[int]] = []
    for text in reversed(remembered):
        if sum(map(len, latest)) + len(text) > most // 2:
            break
        latest.append(text)
    for text in latest:
        assert max(length for length, _ in followed(corpus, text)) == len(text)


def test_old_texts_are_forgotten() -> None:
    corpus = LookupCorpus(8)
    for first in (10, 20, 30):
        corpus.add(range(first, first + 4))
    assert [length for length, _ in followed(corpus, [10, 11])] == [0, 0]
    assert [length for length, _ in followed(corpus, [20, 21])] == [2, 0]
    assert [length for length, _ in followed(corpus, [30, 31])] == [0, 2]


@pytest.mark.parametrize("size", [1, 0, 2.5, True, "many"])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"max_tokens={size!r} must be an integer of at least 2"):
        LookupCorpus(size)


def test_ids_that_are_none() -> None:
    with pytest.raises(ConfigurationError, match="tokens holds -3; give token ids"):
        LookupCorpus().add([4, -3])
