"""One sequence on its way through the decode loop, as the host sees it; and the names of the models' roles.

Knows nothing of models, nor of what the device keeps of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specproxy.config import MAX_DRAFT_TOKENS
from specproxy.processors import RowLaw
from specproxy.schedule import CONSTANT, AlphaSchedule
from specproxy.stats import SpeculationStats
from specproxy.suffix import LookupCorpus

__all__ = ["ANTI_EXPERT", "ASSISTANT", "BASE", "EXPERT", "FINISHED", "Row", "StoppingCriterion"]

BASE, EXPERT, ANTI_EXPERT = "base", "expert", "anti_expert"
ASSISTANT = "assistant"  # drafts alone: no part of the logit arithmetic
FINISHED = ("stop", "length")  # ways for a row to end that its text is complete with

StoppingCriterion = Callable[[Tensor, Any], Tensor | bool]


@dataclass
class Row:
    """One sequence, as the host sees it.

    Args:
        index: the row's place in its call.
        prompts: per role, its prompt's ids, unpadded and not empty.
        law: how its combined logits become a law.
        alphas: strength of each pair.
        key: its noise key, 64 bits as int64.
        max_new_tokens: tokens after which it ends.
        eos_token_ids: tokens that end it; the token itself is kept.
        stopping_criteria: called with the base's prefix, int64 [1, L], after every token; true ends the row.
        max_draft_tokens: drafts that it takes part with at most, whatever the window.
        statistics: where given, takes the row's own counts.
        keeps_logits: whether it keeps the combined logits of its tokens, beside what the state records.
        schedule: how the strengths change over its tokens.
        corpus: further texts that lookup may copy from.
    """

    index: int
    prompts: dict[str, list[int]]
    law: RowLaw
    alphas: tuple[float, ...]
    key: int
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stopping_criteria: Sequence[StoppingCriterion] = ()
    max_draft_tokens: int = MAX_DRAFT_TOKENS
    statistics: SpeculationStats | None = None
    keeps_logits: bool = False
    schedule: AlphaSchedule = CONSTANT
    corpus: LookupCorpus | None = None
    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    finish_reason: str | None = None  # one of FINISHED, "error", or whatever else somebody took it out for
    error: str | None = None
    logits: list[Tensor] = field(default_factory=list)  # per new token, where they are recorded: combined [V]
    scores: list[Tensor] = field(default_factory=list)  # likewise: processed and warped [V]
    drafter: str | None = None  # who drafted for it in its last cycle
    refused: list[int] = field(default_factory=list)  # drafts of that cycle from the refused one on; see `Block`
    memory: dict[str, Any] = field(default_factory=dict)  # what drafters remember of the row, by their name

    @property
    def remaining(self) -> int:
        """Tokens left in the row's budget."""
        return self.max_new_tokens - len(self.tokens)

    def prefix(self, drafts: Sequence[int] = ()) -> Tensor:
        """int64 [1, L]: the base's prompt, the row's tokens, and drafts."""
        return torch.tensor([[*self.prompts[BASE], *self.tokens, *drafts]], dtype=torch.long)

    def append(self, tokens: list[int], sources: list[str]) -> int:
        """Take a cycle's tokens up to the row's end; returns how many were taken."""
        taken = 0
        for token, source in zip(tokens, sources, strict=True):
            self.tokens.append(token)
            self.sources.append(source)
            taken += 1
            if token in self.eos_token_ids or self._should_stop():
                self.finish_reason = "stop"
                break
            if self.remaining == 0:
                self.finish_reason = "length"
                break
        return taken

    def _should_stop(self) -> bool:
        return any(bool(torch.as_tensor(stop(self.prefix(), None)).all()) for stop in self.stopping_criteria)

    def fail(self, reason: str) -> None:
        """End the row because no token can be drawn."""
        self.finish_reason, self.error = "error", reason
