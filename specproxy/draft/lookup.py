"""Drafts copied from where the text has been before: the row's own prompt and output, and a corpus of other texts.

They cost no forward and are certain (their law is one-hot). How many a row gets depends on its committed tokens alone,
as it must under `rejection` and `block`. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specproxy.policy import Plan
from specproxy.state import BASE, DecodeState, Draft, Row
from specproxy.suffix import Cursor, SuffixAutomaton
from specproxy.trio import TrioRunners
from specproxy_kernels import NoiseStream

__all__ = ["SHORTEST_MATCH", "LookupDrafter", "Offer", "certain_draft", "look_up"]

SHORTEST_MATCH = 2  # tokens: what follows a single repeated one is hardly a guess


class Offer(NamedTuple):
    """What lookup has for a row: the length of the match, and the tokens that followed it where it occurred before."""

    length: int
    tokens: list[int]


def look_up(state: DecodeState, row: Row, count: int, drafts: Sequence[int] = ()) -> Offer:
    """What followed the longest suffix of a row's text that occurred before. Host work alone; no draft is tied to it.

    Args:
        state: the row's, for the shared vocabulary: an offer ends before an id that is not shared.
        row: its automaton is made at the first call and follows its tokens at the others.
        count: tokens at most.
        drafts: tokens to go on from, behind the row's own.

    Returns:
        The offer of the longer match, the row's own text before the corpus; without tokens where the match is shorter
        than `SHORTEST_MATCH`.
    """
    memory = row.memory.get(LookupDrafter.name)
    if memory is None:
        memory = row.memory[LookupDrafter.name] = _RowMemory(row)
    length, tokens = memory.offer(row, count, drafts)
    end = next((i for i, token in enumerate(tokens) if not state.is_shared(token)), len(tokens))
    return Offer(length, tokens[:end])


class _RowMemory:
    """A row's text as an automaton, and where the text stands in the corpus."""

    def __init__(self, row: Row) -> None:
        self._text = SuffixAutomaton(row.prompts[BASE])
        self._prompt_length = len(row.prompts[BASE])
        self._cursors: dict[int, tuple[SuffixAutomaton, Cursor]] = {}

    def offer(self, row: Row, count: int, drafts: Sequence[int]) -> Offer:
        known = len(self._text.tokens)
        new = row.tokens[known - self._prompt_length :]
        for token in new:
            self._text.append(token)
        cursor = self._text.repeated()
        for token in drafts:
            cursor = self._text.advance(cursor, token)
        best = Offer(cursor.length, [])
        if cursor.length >= SHORTEST_MATCH:
            best = Offer(cursor.length, self._text.continuation(cursor, count, drafts))
        if row.corpus is None:
            return best
        with row.corpus.lock:
            shelves = row.corpus.shelves
            followed = {id(shelf): self._follow(shelf, new) for shelf in shelves}
            self._cursors = followed
            for shelf, cursor in followed.values():
                for token in drafts:
                    cursor = shelf.advance(cursor, token)
                if cursor.length > best.length and cursor.length >= SHORTEST_MATCH:
                    best = Offer(cursor.length, shelf.continuation(cursor, count))
        return best

    def _follow(self, shelf: SuffixAutomaton, new: Sequence[int]) -> tuple[SuffixAutomaton, Cursor]:
        """The cursor of the whole text in a shelf, which has seen all but `new` unless it is new itself."""
        _, cursor = self._cursors.get(id(shelf), (shelf, None))
        if cursor is None:
            cursor, new = Cursor(), self._text.tokens
        for token in new:
            cursor = shelf.advance(cursor, token)
        return shelf, cursor


class LookupDrafter:
    """Proposes what `look_up` offers."""

    name = "lookup"

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Copy at most `plan.num_drafts` tokens per row, none where nothing repeats; see `Drafter`."""
        offers = [
            look_up(state, row, max(0, min(plan.num_drafts, row.remaining - 1, row.max_draft_tokens))).tokens
            for row in state.rows
        ]
        return certain_draft(state, noise, offers)


def certain_draft(state: DecodeState, noise: NoiseStream, proposals: Sequence[Sequence[int]]) -> Draft:
    """A draft of given tokens, a list for every row in flight, none past its budget; as long as the longest."""
    count = max(map(len, proposals))
    if state.rule == "coupled":
        noise.expect(count + 1)
    padded = [[*tokens, *[0] * (count - len(tokens))] for tokens in proposals]
    tokens = torch.tensor(padded, dtype=torch.long).view(len(proposals), count).to(state.device)
    num_drafts = torch.tensor([len(tokens) for tokens in proposals]).to(state.device)
    return Draft(tokens, num_drafts, None, None)
