"""The state of a decode: rows in flight, on the host and on the device; and what one cycle passes on.

Tensor dimensions, used across the project:

    B  rows    W  window    G = W - 1  drafts    S  sequence    V  vocabulary    H  heads    D  head size

Rows are kept dense: row i of every tensor, and of every cache, is `rows[i]`. This module knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specproxy.processors import RowLaw
from specproxy.warp import build_warp, needs_seen_tokens
from specproxy_kernels import DraftLaw, NoiseStream, WarpParameters, pack_allowed_tokens

__all__ = ["ANTI_EXPERT", "BASE", "EXPERT", "DecodeState", "Draft", "Row"]

BASE, EXPERT, ANTI_EXPERT = "base", "expert", "anti_expert"

StoppingCriterion = Callable[[Tensor, Any], Tensor | bool]


@dataclass
class Row:
    """One sequence, as the host sees it.

    Args:
        index: the row's place in its call.
        prompts: per role, its prompt's ids, unpadded and not empty.
        law: how its combined logits become a law.
        alphas: proxy strength of each pair.
        key: its noise key, 64 bits as int64.
        max_new_tokens: tokens after which it ends.
        eos_token_ids: tokens that end it; the token itself is kept.
        stopping_criteria: called with the base's prefix, int64 [1, L], after every token; true ends the row.
    """

    index: int
    prompts: dict[str, list[int]]
    law: RowLaw
    alphas: tuple[float, ...]
    key: int
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stopping_criteria: Sequence[StoppingCriterion] = ()
    tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "error"
    error: str | None = None
    logits: list[Tensor] = field(default_factory=list)  # per new token, where the call records them: combined [V]
    scores: list[Tensor] = field(default_factory=list)  # likewise: processed and warped [V]

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


@dataclass
class Draft:
    """What a drafter proposes for one cycle.

    Args:
        tokens: int64 [B, G].
        num_drafts: int64 [B], drafts of each row, at most G.
        law: what the tokens were drawn from; None where they are certain.
        expert_logits: expert logits at the leading window positions, [B, <= W, V_expert], where drafting made them.
    """

    tokens: Tensor
    num_drafts: Tensor
    law: DraftLaw | None
    expert_logits: Tensor | None

    @property
    def count(self) -> int:
        """G."""
        return self.tokens.shape[1]


class DecodeState:
    """All rows in flight.

    Args:
        device: of the combined logits and of everything drawn from them.
        vocab_size: V, the shared vocabulary.
        allowed: int32 [1, 1, ceil(V / 32)], valid ids, or None where all are.
        rule: acceptance rule.
        roles: whose inputs are kept: the base's and those of every pair.
        records_logits: whether rows keep the logits and scores of their tokens.
    """

    def __init__(
        self,
        device: torch.device,
        vocab_size: int,
        allowed: Tensor | None,
        rule: str,
        roles: Sequence[str],
        records_logits: bool = False,
    ) -> None:
        self.device = device
        self.vocab_size = vocab_size
        self.allowed = allowed
        self.rule = rule
        self.roles = tuple(roles)
        self.records_logits = records_logits
        self.has_processors = False
        self.rows: list[Row] = []
        self.pending = {role: self._integers([]) for role in self.roles}  # [B], each role's next input
        self.start = self._integers([])  # [B], tokens generated so far
        self.key = self._integers([])  # [B]
        self.alpha = torch.zeros(0, (len(self.roles) - 1) // 2, device=device, dtype=torch.float64)  # [B, pairs]
        self.seen: Tensor | None = None  # bool [B, V]
        self._warp: WarpParameters | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def admit(self, rows: list[Row]) -> None:
        """Append rows whose prompts, but for their last token, are in the caches."""
        for role in self.roles:
            last = self._integers([row.prompts[role][-1] for row in rows])
            self.pending[role] = torch.cat([self.pending[role], last])
        self.start = torch.cat([self.start, self._integers([len(row.tokens) for row in rows])])
        self.key = torch.cat([self.key, self._integers([row.key for row in rows])])
        self.alpha = torch.cat(
            [self.alpha, torch.tensor([row.alphas for row in rows], dtype=torch.float64).to(self.device)]
        )
        if self.seen is not None or needs_seen_tokens([row.law.sampling for row in rows]):
            before = self._seen(self.rows) if self.seen is None else self.seen
            self.seen = torch.cat([before, self._seen(rows)])
        self.rows += rows
        self._rebuild()

    def keep(self, slots: list[int]) -> None:
        """Keep the given rows, in the given order."""
        index = self._integers(slots)
        self.rows = [self.rows[slot] for slot in slots]
        self.pending = {role: pending[index] for role, pending in self.pending.items()}
        self.start, self.key, self.alpha = self.start[index], self.key[index], self.alpha[index]
        if self.seen is not None:
            self.seen = self.seen[index]
        self._rebuild()

    def _seen(self, rows: list[Row]) -> Tensor:
        seen = torch.zeros(len(rows), self.vocab_size, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, [t for t in row.prompts[BASE] + row.tokens if t < self.vocab_size]] = True
        return seen.to(self.device)

    def _rebuild(self) -> None:
        sampling = [row.law.sampling for row in self.rows]
        self.has_processors = any(row.law.processors for row in self.rows)
        allowed = self._allowed(1, forever=True) if any(row.law.bans for row in self.rows) else self.allowed
        allowed = None if allowed is None else allowed.to(self.device)
        self._warp = build_warp(sampling, self.seen, allowed, self.device) if self.rows else None

    def _allowed(self, window: int, forever: bool = False) -> Tensor:
        """int32 [B, W, ceil(V / 32)]: valid ids less the rows' bans (or those that never end) over the next window."""
        allowed = torch.ones(len(self.rows), window, self.vocab_size, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            for ban in row.law.bans:
                if forever and ban.until is not None:
                    continue
                ids = [token for token in ban.token_ids if token < self.vocab_size]
                last = window if ban.until is None else max(0, min(window, ban.until - len(row.tokens)))
                allowed[i, :last, ids] = False
        packed = pack_allowed_tokens(allowed)
        return packed if self.allowed is None else packed & self.allowed

    @property
    def shared_ids(self) -> Tensor | None:
        """int32 [1, 1, ceil(V / 32)], valid ids where the logits are, or None where all are."""
        return None if self.allowed is None else self.allowed.to(self.device)

    def warp(self, window: int) -> WarpParameters:
        """The rows' warp for a window of W positions."""
        assert self._warp is not None, "there are no rows"
        changing = any(
            ban.until is not None and ban.until > len(row.tokens) for row in self.rows for ban in row.law.bans
        )
        if not changing:
            return self._warp
        return replace(self._warp, allowed=self._allowed(window).to(self.device))

    def process(self, logits: Tensor, drafts: Tensor, first: int) -> Tensor:
        """Run the rows' processors.

        Left alone are positions that hold NaN, unless the row removes invalid values, and those behind an end token or
        a row's budget: their law is not read, and processors of a caller need not know such prefixes.

        Args:
            logits: [B, k, V] at window positions first .. first + k - 1.
            drafts: int64 [B, >= first + k - 1].
            first: window position of the first column.

        Returns:
            [B, k, V]; `logits` itself where no row has processors.
        """
        if not self.has_processors:
            return logits
        processed = logits.clone()
        for i, (row, tokens) in enumerate(zip(self.rows, drafts.tolist(), strict=True)):
            if not row.law.processors:
                continue
            for k in range(logits.shape[1]):
                if first + k >= row.remaining or not row.eos_token_ids.isdisjoint(tokens[: first + k]):
                    break
                if row.law.removes_invalid or not bool(logits[i, k].isnan().any()):
                    prefix = row.prefix(tokens[: first + k]).to(logits.device)
                    processed[i, k] = row.law.process(prefix, logits[i, k])
        return processed

    @staticmethod
    def num_drafts(row: Row, count: int) -> int:
        """Drafts of a row in a window of `count` of them: the last token of its budget is never one."""
        return min(count, row.remaining - 1)

    def noise(self) -> NoiseStream:
        """The noise of the cycle that starts now."""
        return NoiseStream(self.key, self.start, self.start if self.rule == "block" else None)

    def commit(self, drafts: Tensor, num_accepted: Tensor, next_token: Tensor) -> None:
        """Advance the device's side of every row by its accepted drafts and its next token."""
        if self.seen is not None:
            for i in range(drafts.shape[1]):
                token = drafts[:, i : i + 1]
                self.seen.scatter_(1, token, self.seen.gather(1, token) | (num_accepted > i)[:, None])
            self.seen.scatter_(1, next_token[:, None], True)
        self.start = self.start + num_accepted + 1
        self.pending = dict.fromkeys(self.roles, next_token)
