"""A grammar small enough to enumerate, as the runtime takes it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import tiny
import torch

from specproxy_kernels import pack_allowed_tokens

END = 7


def allows(tokens: Sequence[int], vocab: int, end: int | None) -> list[int]:
    """A toy grammar: steps of one, two or three upwards (modulo V), a multiple of three only behind an even token.

    With an end token: it may come behind every fifth token alone, and nothing else may come there after 15.
    """
    last = tokens[-1] if tokens else 1
    if end is not None and len(tokens) >= 15 and len(tokens) % 5 == 0:
        return [end]
    following = [(last + step) % vocab for step in (1, 2, 3)]
    following = [token for token in following if token != end and (token % 3 or last % 2 == 0)]
    return following + ([end] if end is not None and tokens and len(tokens) % 5 == 0 else [])


@functools.cache
def packed(tokens: tuple[int, ...], vocab: int) -> torch.Tensor:
    allowed = torch.zeros(vocab, dtype=torch.bool)
    allowed[list(tokens)] = True
    return pack_allowed_tokens(allowed)


@dataclass
class Steps:
    """The toy grammar of `allows` as the runtime takes it; it remembers what it was asked."""

    vocab: int = tiny.VOCAB_SIZE
    end: int | None = END
    asked: list[list[int]] = field(default_factory=list)

    def walk(self) -> Steps:
        return self

    def mask(self, tokens: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(tokens))
        return packed(tuple(allows(tokens, self.vocab, self.end)), self.vocab)


def is_legal(tokens: Sequence[int], vocab: int = tiny.VOCAB_SIZE, end: int | None = END) -> bool:
    return all(token in allows(tokens[:i], vocab, end) for i, token in enumerate(tokens))
