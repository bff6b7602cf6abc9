"""What a grammar is to the runtime: it tells which tokens may follow those that a row has generated, as bits.

No library of grammars is known here (`specproxy.structured` adapts one), and nothing of models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specproxy_kernels import unpack_allowed_tokens

__all__ = ["Grammar", "GrammarProcessor", "GrammarWalk", "allowed_words"]


class GrammarWalk(Protocol):
    """One row's way through a grammar. It may keep its place; what it answers depends on its arguments alone."""

    def mask(self, tokens: Sequence[int]) -> Tensor:
        """The tokens that may come next.

        Args:
            tokens: all that the row has generated, drafts included; each was allowed where it stands, none ends the
                row. Drafts may be gone at the next call.

        Returns:
            int32 words on the CPU, bit v % 32 of word v // 32 for token v; tokens behind the last word are not allowed.
            End tokens are allowed where the text may end.
        """
        ...


class Grammar(Protocol):
    """What any number of rows may be held to."""

    def walk(self) -> GrammarWalk:
        """A walk from the beginning, for one row."""
        ...


def allowed_words(
    walk: GrammarWalk, tokens: Sequence[int], drafts: Sequence[int], ends: Collection[int], reach: int, size: int
) -> Tensor:
    """What a row may draw behind its tokens, and behind every leading part of drafts.

    Open are positions out of reach and those behind an end token or a draft that is not allowed: no law there is read
    for a token that stays, and a grammar does not know such texts.

    Args:
        walk: of the row.
        tokens: that it has generated.
        drafts: behind them, k.
        ends: tokens that end the row.
        reach: positions in reach, counted from the first.
        size: ceil(V / 32).

    Returns:
        int32 [k + 1, size] on the CPU.
    """
    words = torch.full((len(drafts) + 1, size), -1, dtype=torch.int32)
    text = list(tokens)
    for position in range(min(len(drafts) + 1, reach)):
        if position:
            draft = drafts[position - 1]
            word = int(words[position - 1, draft // 32]) if 0 <= draft < 32 * size else 0
            if draft in ends or not word >> draft % 32 & 1:
                break
            text.append(draft)
        mask = walk.mask(text)[:size]
        words[position, : len(mask)] = mask
        words[position, len(mask) :] = 0
    return words


class GrammarProcessor:
    """The same as a processor of logits, for rows whose filters run in Python.

    Args:
        walk: of the row.
        prompt_length: of the base's unpadded prompt, which the grammar does not see.
    """

    def __init__(self, walk: GrammarWalk, prompt_length: int) -> None:
        self._walk, self._prompt_length = walk, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] for the prefix int64 [1, L], -inf where a token may not come."""
        size = -(-scores.shape[-1] // 32)
        words = allowed_words(self._walk, input_ids[0, self._prompt_length :].tolist(), (), (), 1, size)
        allowed = unpack_allowed_tokens(words, scores.shape[-1]).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)
