"""An assistant drafts: a further model of the same vocabulary, which is no part of the target's law.

It reads what the base reads. Its cache follows nobody: it is brought up to date when the assistant drafts, by a window
from each row's own cached length to its pending token, and that is also how a last draft that was accepted, and never
read, gets in. One more forward a cycle past the last draft would spare the second token of such windows, and cost more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.draft.expert import draw_draft, join_draft, no_draft
from specproxy.policy import Plan
from specproxy.runner import Runner
from specproxy.state import BASE, DecodeState, Draft, Row
from specproxy.trio import TrioRunners
from specproxy_kernels import DraftLaw, NoiseStream

__all__ = ["AssistantDrafter", "adopt_row", "find_rows", "slot_and_length"]

_LONGEST_WINDOW = 64  # tokens; a longer delay is made up for as a prompt is read
_PIECE = 2048


@dataclass
class _Reading:
    """What the assistant's cache held of a row when it had drafted.

    Args:
        length: of the row's text, its pending token included.
        drafts: int64 [B, G - 1], drafts that it read behind the text.
        slot: the row's then.
    """

    length: int
    drafts: Tensor
    slot: int


class AssistantDrafter:
    """Draws from the assistant's warped law, step by step."""

    name = "assistant"

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Draw `plan.num_drafts` tokens per row; see `Drafter`."""
        count = plan.num_drafts
        if count == 0:
            return no_draft(state)
        runner = runners.assistant
        assert runner is not None, "there is no assistant"
        parameters = state.warp(count + 1)
        noise.expect(count + (state.rule == "coupled"))
        find_rows(state, runners)
        logits = _catch_up(state, runner).to(state.device)
        drafts = torch.empty(state.width, 0, dtype=torch.long, device=state.device)
        laws: list[DraftLaw] = []
        for i in range(count):
            if i:
                logits = runner.forward(drafts[:, -1:], offset=i).to(state.device)
            token, law = draw_draft(state, logits, parameters, drafts, noise)
            drafts = torch.cat([drafts, token], dim=1)
            laws.append(law)
        for slot, row in enumerate(state.rows):
            row.memory[self.name] = _Reading(_length(row), drafts[:, :-1], slot)
        # A law that is no law (NaN, infinite, empty) is not drafted from: the target need not share the fault.
        usable = torch.cat([law.lse for law in laws], dim=1).isfinite().long().cumprod(1).sum(1)  # [B]
        return join_draft(state, drafts, state.num_drafts(count).minimum(usable), laws, None)


def _length(row: Row) -> int:
    return len(row.prompts[BASE]) + len(row.tokens)


def _text(row: Row, first: int, last: int) -> list[int]:
    """Tokens first .. last - 1 of what the base reads."""
    prompt = row.prompts[BASE]
    return prompt[first:last] + row.tokens[max(0, first - len(prompt)) : max(0, last - len(prompt))]


def adopt_row(state: DecodeState, runners: TrioRunners, row: Row, slot: int) -> None:
    """Place a row behind those in flight that the assistant has read up to its pending token, in another slot.

    Args:
        state: the rows in flight, which the row joins next.
        runners: of the models.
        row: what has been read.
        slot: where, in the assistant's cache; behind all rows in flight.
    """
    assert runners.assistant is not None, "there is no assistant"
    find_rows(state, runners)  # what stands in the row's place may have moved
    cache = runners.assistant.cache
    cache.clear(len(state))
    cache.move(slot, len(state))
    runners.assistant_rows.append(row)
    row.memory[AssistantDrafter.name] = _Reading(_length(row), torch.empty(1, 0, dtype=torch.long), 0)


def slot_and_length(runners: TrioRunners, row: Row) -> tuple[int, int] | None:
    """Where a row stands in the assistant's cache, and how many leading positions of its text hold there.

    Args:
        runners: of the models.
        row: at any time between two cycles, or at the end of one.

    Returns:
        The slot and the length, the pending token left out; None where the assistant holds nothing of the row.
    """
    slot = next((i for i, owner in enumerate(runners.assistant_rows) if owner is row), None)
    reading: _Reading | None = row.memory.get(AssistantDrafter.name)
    if slot is None or reading is None:
        return None
    kept = reading.length
    following = row.tokens[kept - len(row.prompts[BASE]) :]
    for draft, token in zip(reading.drafts[reading.slot].tolist(), following, strict=False):
        if draft != token:
            break
        kept += 1
    return slot, min(kept, _length(row) - 1)


def find_rows(state: DecodeState, runners: TrioRunners) -> None:
    """Give every row in flight its own slot in the assistant's cache, with the length of what still holds there."""
    assert runners.assistant is not None, "there is no assistant"
    cache = runners.assistant.cache
    held: dict[int, int] = {}
    for row in state.rows:
        found = slot_and_length(runners, row)
        if found is not None:
            held[id(row)], length = found
            cache.set_lengths(found[0], [length])
    # Rows move to lower slots alone, so that none is overwritten before it has moved.
    for slot, row in enumerate(state.rows):
        source = held.get(id(row))
        if source == slot:
            continue
        cache.clear(slot)
        if source is None:
            cache.set_lengths(slot, [0])
            row.memory.pop(AssistantDrafter.name, None)
        else:
            cache.move(source, slot)
    runners.assistant_rows = list(state.rows)


def _catch_up(state: DecodeState, runner: Runner) -> Tensor:
    """Read every row up to its pending token; returns the logits behind it, [B, 1, V], the lengths being before it."""
    cache, count = runner.cache, len(state)
    last = [_length(row) - 1 for row in state.rows]
    while True:
        lengths = cache.host_lengths[:count]
        delay = max(end - length for end, length in zip(last, lengths, strict=True))
        if delay < _LONGEST_WINDOW:
            break
        pieces = [
            _text(row, length, min(end, length + _PIECE))
            for row, end, length in zip(state.rows, last, lengths, strict=True)
        ]
        runner.extend(0, pieces)
    windows = [_text(row, length, end + 1) for row, end, length in zip(state.rows, last, lengths, strict=True)]
    tokens = torch.tensor([window + [0] * (delay + 1 - len(window)) for window in windows])
    logits = runner.forward(tokens.to(state.device))
    cache.set_lengths(0, last)
    index = torch.tensor([len(window) - 1 for window in windows]).to(logits.device)
    return logits[torch.arange(count, device=logits.device), index][:, None]
