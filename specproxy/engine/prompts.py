"""The prompt that is being read: in pieces, into a slot of its own behind the rows in flight.

It holds nobody up for longer than a piece takes. What is known of it already, from rows in flight or from kept
prefixes, is copied. Where an assistant drafts, it reads the prompt too. Knows nothing of queues or cycles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.draft.assistant import adopt_row, find_rows, slot_and_length
from specproxy.engine.logprobs import token_logprobs
from specproxy.engine.prefixes import Place, PrefixStore
from specproxy.engine.requests import Request
from specproxy.runner import Runner
from specproxy.state import ASSISTANT, BASE, DecodeState, Row
from specproxy.trio import TrioRunners
from specproxy_kernels import combine_logits

__all__ = ["PromptReader", "Reading"]


@dataclass
class Reading:
    """A request whose prompt is being read.

    Args:
        request: whose.
        prompts: per role that reads, what it reads.
        done: per role, how far it is.
    """

    request: Request
    prompts: dict[str, list[int]]
    done: dict[str, int]

    def left(self, role: str) -> int:
        """Tokens to read; the prompt's last one opens the first window."""
        return len(self.prompts[role]) - 1 - self.done[role]

    @property
    def is_done(self) -> bool:
        """Whether every role has read all of it."""
        return all(self.left(role) == 0 for role in self.done)


class PromptReader:
    """Reads one prompt at a time.

    Args:
        runners: of the models.
        state: the rows in flight, in the leading slots.
        slot: in which prompts are read, behind every slot that a cycle may touch.
        prefixes: keys and values of earlier requests.
        has_assistant: whether the assistant drafts.
    """

    def __init__(
        self, runners: TrioRunners, state: DecodeState, slot: int, prefixes: PrefixStore, has_assistant: bool
    ) -> None:
        self._runners, self._state, self._slot, self._prefixes = runners, state, slot, prefixes
        self._readers: dict[str, Runner] = dict(runners.by_role)
        if has_assistant:
            assert runners.assistant is not None, "there is no assistant"
            self._readers[ASSISTANT] = runners.assistant
        self.reading: Reading | None = None

    def begin(self, request: Request) -> None:
        """Give a request the slot, with what is known of its prompts in it."""
        prompts = dict(request.row.prompts)
        if ASSISTANT in self._readers:
            prompts[ASSISTANT] = prompts[BASE]
        self.reading = Reading(request, prompts, dict.fromkeys(self._readers, 0))
        if request.prompt_logprobs is None and self._prefixes.max_positions:  # those need every position's logits
            if ASSISTANT in self._readers:
                find_rows(self._state, self._runners)  # in its cache rows stand where they were when it drafted
            held = [self._held(row, slot) for slot, row in enumerate(self._state.rows)]
            self.reading.done |= self._prefixes.restore(self._places(self._slot), prompts, held)
        request.num_reused_tokens = self.reading.done[BASE]

    def keep(self, row: Row, slot: int) -> None:
        """Copy a row that has ended, for prompts that begin alike, while the caches still hold it."""
        if not self._prefixes.max_positions:
            return
        places, tokens = self._places(slot), self._held(row, slot)
        if ASSISTANT in places:
            found = slot_and_length(self._runners, row)
            if found is None:
                return
            places[ASSISTANT] = Place(places[ASSISTANT].cache, found[0])
            tokens[ASSISTANT] = [*row.prompts[BASE], *row.tokens][: found[1]]
        self._prefixes.keep(places, tokens)

    def _places(self, slot: int) -> dict[str, Place]:
        return {role: Place(runner.cache, slot) for role, runner in self._readers.items()}

    def _held(self, row: Row, slot: int) -> dict[str, list[int]]:
        """Per role, the tokens whose keys and values stand in a row's slot."""
        return {
            role: [*row.prompts.get(role, row.prompts[BASE]), *row.tokens][: runner.cache.host_lengths[slot]]
            for role, runner in self._readers.items()
        }

    def read(self, budget: int) -> int:
        """Read at most `budget` further tokens in every role; returns how many in the longest piece."""
        reading = self.reading
        assert reading is not None, "no prompt has been begun"
        logits: dict[str, Tensor] = {}
        longest = 0
        scores = reading.request.prompt_logprobs is not None
        for role, runner in self._readers.items():
            first, size = reading.done[role], min(budget, reading.left(role))
            if size == 0:
                continue
            piece = reading.prompts[role][first : first + size]
            logits[role] = runner.extend(self._slot, [piece], all_logits=scores and role != ASSISTANT)
            reading.done[role] += size
            longest = max(longest, size)
        if logits and scores:
            self._score(reading, logits, longest)
        return longest

    def _score(self, reading: Reading, logits: dict[str, Tensor], size: int) -> None:
        """What the combined law says of the prompt's tokens behind the piece just read."""
        request, done, state = reading.request, reading.done[BASE], self._state
        lines = {role: logits[role].to(state.device) for role in self._runners.by_role}
        pairs = [
            pair.term(lines, torch.full((1, size), alpha, dtype=torch.float64, device=state.device))
            for pair, alpha in zip(self._runners.pairs, request.row.alphas, strict=True)
        ]
        combined, bad = combine_logits(lines[BASE], pairs, state.vocab_size, state.shared_ids)
        if bool(bad.any()):
            raise ArithmeticError("the models' logits over the prompt are not usable (NaN or infinite)")
        assert request.prompt_logprobs is not None
        following = request.row.prompts[BASE][done - size + 1 : done + 1]
        request.scored_prompt += token_logprobs(combined[0], following, request.prompt_logprobs)

    def move(self, row: Row) -> None:
        """Copy the row whose prompt has been read behind the rows in flight, in every cache; the slot keeps it."""
        for runner in self._runners:
            runner.cache.move(self._slot, len(self._state))
        if ASSISTANT in self._readers:
            adopt_row(self._state, self._runners, row, self._slot)

    def empty(self, clears: bool = False) -> None:
        """Let the slot's row go; `clears` also zeroes what it may hold that is not finite."""
        for runner in self._readers.values():
            if clears:
                runner.cache.clear(self._slot)
            runner.cache.empty(self._slot, self._slot + 1)
