"""The state of a decode: the rows in flight, on the device; and what one cycle passes on.

Tensor dimensions, used across the project:

    B  rows    W  window    G = W - 1  drafts    S  sequence    V  vocabulary    H  heads    D  head size

Rows are kept dense: row i of every tensor, and of every cache, is `rows[i]`. This module knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import Tensor

from specproxy.grammar import allowed_words
from specproxy.row import ANTI_EXPERT, ASSISTANT, BASE, EXPERT, FINISHED, Row
from specproxy.schedule import SCHEDULE_SIZE, scheduled_strengths
from specproxy.tree import TreeShape
from specproxy.warp import build_warp, needs_counts, needs_seen_tokens
from specproxy_kernels import DraftLaw, NoiseStream, WarpParameters, pack_allowed_tokens

__all__ = ["ANTI_EXPERT", "ASSISTANT", "BASE", "EXPERT", "FINISHED", "DecodeState", "Draft", "Row"]

# Per row in the warp, and known to the host alone until rows change.
_WARP_COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass
class Draft:
    """What a drafter proposes for one cycle.

    Args:
        tokens: int64 [B, G].
        num_drafts: int64 [B], drafts of each row, at most G.
        law: what the tokens were drawn from; None where they are certain.
        expert_logits: expert logits at the leading window positions, [B, <= W, V_expert], where drafting made them.
        tree: where the tokens are the drafted nodes of one, G of them; `num_drafts` is then the depth that a row may
            reach, and `expert_logits` are those of all nodes, or of the nodes that have children. The walk through the
            tree leaves the path that it took: tokens by depth, as in a chain.
        nodes: int64 [B, D], the nodes of that path; None before.
        entropies: where the draft was free to stop early, those of the laws on its way, in nats, [B, G or G + 1].
    """

    tokens: Tensor
    num_drafts: Tensor
    law: DraftLaw | None
    expert_logits: Tensor | None
    tree: TreeShape | None = None
    nodes: Tensor | None = None
    entropies: Tensor | None = None

    @property
    def count(self) -> int:
        """G."""
        return self.tokens.shape[1]


class DecodeState:
    """All rows in flight.

    What the device needs to know of a row stands in buffers of `max_rows` rows that are written in place and never
    move; the attributes are views of their first `width` rows. Rows behind those in flight are idle: they have no
    budget left, so that a cycle that runs over them advances nothing.

    Args:
        max_rows: rows that may be in flight together.
        device: of the combined logits and of everything drawn from them.
        vocab_size: V, the shared vocabulary.
        allowed: int32 [1, 1, ceil(V / 32)], valid ids, or None where all are.
        rule: acceptance rule.
        roles: whose inputs are kept: the base's and those of every pair.
        records_logits: whether rows keep the logits and scores of their tokens.
        buffers: memory of an earlier state with the same `max_rows`, device, vocabulary and roles, to go on with.
    """

    def __init__(
        self,
        max_rows: int,
        device: torch.device,
        vocab_size: int,
        allowed: Tensor | None,
        rule: str,
        roles: Sequence[str],
        records_logits: bool = False,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.device = device
        self.vocab_size = vocab_size
        self.rule = rule
        self.roles = tuple(roles)
        self.records_logits = records_logits
        self.has_processors = self.has_grammars = False
        self.rows: list[Row] = []
        self.shared_ids = None if allowed is None else allowed.to(device)  # int32 [1, 1, ceil(V / 32)], None: all
        self._host_allowed = None if allowed is None else allowed.cpu()
        self._buffers = {} if buffers is None else buffers
        self._uses_seen = self._uses_counts = False
        self.has_schedules = False
        for name in (*self.roles, "start", "key", "remaining", "most_drafts"):
            self._buffer(name).zero_()
        num_pairs = sum(role.startswith(EXPERT) for role in self.roles)
        self._buffer("alpha", num_pairs, dtype=torch.float64).zero_()
        self._warp: WarpParameters | None = None
        self._look(0)

    def __len__(self) -> int:
        return len(self.rows)

    def _buffer(self, name: str, *size: int, dtype: torch.dtype = torch.long) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(self.max_rows, *size, dtype=dtype, device=self.device)
        return self._buffers[name]

    @property
    def changing(self) -> list[Tensor]:
        """Every buffer that a commit changes."""
        names = (*self.roles, "start", "remaining", *self._history)
        return [self._buffers[name] for name in names]

    @property
    def _history(self) -> list[str]:
        """Buffers [B, V] of what rows have read and written, as far as some row's law has asked for them."""
        uses = {"seen": self._uses_seen, "counts": self._uses_counts}
        return [name for name, used in uses.items() if used]

    def _look(self, width: int) -> None:
        """Point the views at the first `width` rows."""
        self.width = width
        buffers = self._buffers
        self.pending = {role: buffers[role][:width] for role in self.roles}  # [B] each, each role's next input
        self.start = buffers["start"][:width]  # [B], tokens generated so far
        self.key = buffers["key"][:width]  # [B]
        self.alpha = buffers["alpha"][:width]  # [B, pairs]
        self.remaining = buffers["remaining"][:width]  # [B], tokens left in each row's budget
        self.most_drafts = buffers["most_drafts"][:width]  # [B]
        self._schedule = buffers["schedule"][:width] if self.has_schedules else None  # float64 [B, SCHEDULE_SIZE]
        self.seen = buffers["seen"][:width] if self._uses_seen else None  # bool [B, V]
        self.counts = buffers["counts"][:width] if self._uses_counts else None  # int32 [B, V]

    def _write(self, name: str, first: int, values: Sequence[Any]) -> None:
        buffer = self._buffers[name]
        buffer[first : first + len(values)] = torch.tensor(values, dtype=buffer.dtype).to(self.device)

    def admit(self, rows: list[Row]) -> None:
        """Append rows whose prompts, but for their last token, are in the caches."""
        first = len(self.rows)
        assert first + len(rows) <= self.max_rows, "more rows than buffers"
        self.rows += rows
        self._load(first)

    def reload(self) -> None:
        """Write the device's side anew from the host's: after a cycle that broke off before it was settled."""
        self._buffers["remaining"][len(self.rows) :] = 0
        self._load(0)

    def _load(self, first: int) -> None:
        """Write the rows from `first` on into the buffers."""
        rows = self.rows[first:]
        for role in self.roles:
            self._write(role, first, [(row.tokens or row.prompts[role])[-1] for row in rows])
        self._write("start", first, [len(row.tokens) for row in rows])
        self._write("key", first, [row.key for row in rows])
        self._write("remaining", first, [row.remaining for row in rows])
        self._write("most_drafts", first, [row.max_draft_tokens for row in rows])
        self._write("alpha", first, [row.alphas for row in rows])
        self._load_schedules(first)
        laws = [row.law.sampling for row in rows]
        if self._uses_seen or needs_seen_tokens(laws):
            since, self._uses_seen = first if self._uses_seen else 0, True
            seen = self._buffer("seen", self.vocab_size, dtype=torch.bool)
            seen[since : len(self.rows)] = self._seen(self.rows[since:])
        if self._uses_counts or needs_counts(laws):
            since, self._uses_counts = first if self._uses_counts else 0, True
            counts = self._buffer("counts", self.vocab_size, dtype=torch.int32)
            counts[since : len(self.rows)] = self._counts(self.rows[since:])
        self._rebuild()

    def _load_schedules(self, first: int) -> None:
        """Write the schedules of rows from `first` on; of all where this is the first that changes a strength."""
        if not self.has_schedules and not all(row.schedule.is_constant for row in self.rows[first:]):
            self.has_schedules = True
            self._buffer("schedule", SCHEDULE_SIZE, dtype=torch.float64)
            first = 0
        if self.has_schedules:
            self._write("schedule", first, [row.schedule.numbers for row in self.rows[first:]])

    def keep(self, slots: list[int]) -> None:
        """Keep the given rows, in the given order; those behind them become idle."""
        count, before = len(slots), len(self.rows)
        self.rows = [self.rows[slot] for slot in slots]
        index = torch.tensor(slots, dtype=torch.long).to(self.device)
        moving = [*self.roles, "start", "key", "remaining", "most_drafts", "alpha", *self._history]
        moving += ["schedule"] if self.has_schedules else []
        for name in moving:
            self._buffers[name][:count] = self._buffers[name][index]
        self._buffers["remaining"][count:before] = 0
        self._rebuild()

    def _seen(self, rows: list[Row]) -> Tensor:
        seen = torch.zeros(len(rows), self.vocab_size, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, [t for t in row.prompts[BASE] + row.tokens if t < self.vocab_size]] = True
        return seen.to(self.device)

    def _counts(self, rows: list[Row]) -> Tensor:
        counts = torch.zeros(len(rows), self.vocab_size, dtype=torch.int32)
        for i, row in enumerate(rows):
            tokens = torch.tensor(row.tokens, dtype=torch.long)
            counts[i] = torch.bincount(tokens, minlength=self.vocab_size)
        return counts.to(self.device)

    def widen(self, width: int) -> None:
        """Let the views reach over `width` rows, the last of them idle; a change of rows takes this back."""
        if width != self.width:
            self._rebuild(width)

    def _rebuild(self, width: int | None = None) -> None:
        """Follow a change of rows: views, and the warp."""
        self._look(len(self.rows) if width is None else width)
        self.has_processors = any(row.law.processors for row in self.rows)
        self.has_grammars = any(row.law.grammar is not None for row in self.rows)
        if not self.rows:
            self._warp = None
            return
        # Idle rows take after the first one, so that they ask for nothing that no row in flight needs.
        rows = self.rows + [self.rows[0]] * (self.width - len(self.rows))
        warp = build_warp([row.law.sampling for row in rows], self.seen, None, self.device, self.counts)
        columns = {name: getattr(warp, name) for name in _WARP_COLUMNS}
        columns["allowed"] = self._allowed(rows, 1, forever=True) if any(row.law.bans for row in rows) else None
        columns["logit_bias"] = self._bias(rows) if any(row.law.bias for row in rows) else None
        kept: dict[str, Any] = {
            name: self._keep_column(name, column) for name, column in columns.items() if column is not None
        }
        self._warp = replace(warp, **{"allowed": self.shared_ids, **kept})

    def _keep_column(self, name: str, column: Tensor) -> Tensor:
        """Copy a column of the warp, [B, ...], into its buffer, made at its first use; returns the view."""
        return self._buffer(name, *column.shape[1:], dtype=column.dtype)[: self.width].copy_(column)

    @property
    def warp_features(self) -> tuple[str, ...]:
        """What the rows' warp has to do: all that shapes the device's work beside the numbers in its columns.

        The largest top-k is left out: only the torch reference bounds its work by it, and that is never captured.
        """
        assert self._warp is not None, "there are no rows"
        values = {field.name: getattr(self._warp, field.name) for field in fields(self._warp)}
        used = [name for name, value in values.items() if value is not None and value is not False]
        has_bans = self._warp.allowed is not self.shared_ids
        return (*(name for name in used if name != "max_top_k"), *(["bans"] if has_bans else []))

    def _allowed(self, rows: list[Row], window: int, forever: bool = False) -> Tensor:
        """int32 [B, W, ceil(V / 32)]: valid ids less the rows' bans (or those that never end) over the next window."""
        allowed = torch.ones(len(rows), window, self.vocab_size, dtype=torch.bool)
        for i, row in enumerate(rows):
            for ban in row.law.bans:
                if forever and ban.until is not None:
                    continue
                ids = [token for token in ban.token_ids if token < self.vocab_size]
                last = window if ban.until is None else max(0, min(window, ban.until - len(row.tokens)))
                allowed[i, :last, ids] = False
        packed = pack_allowed_tokens(allowed)
        return packed if self._host_allowed is None else packed & self._host_allowed

    def _bias(self, rows: list[Row]) -> Tensor:
        """float32 [B, V], as Transformers keeps a bias."""
        bias = torch.zeros(len(rows), self.vocab_size)
        for i, row in enumerate(rows):
            for token, value in row.law.bias:
                bias[i, token] = value
        return bias

    @property
    def has_changing_bans(self) -> bool:
        """Whether some row's bans end with its length."""
        return any(ban.until is not None and ban.until > len(row.tokens) for row in self.rows for ban in row.law.bans)

    @property
    def needs_host(self) -> bool:
        """Whether the coming cycle has to look at the rows' own state on the host while it runs."""
        return self.has_processors or self.has_grammars or self.records_logits or self.has_changing_bans

    @property
    def is_dense(self) -> bool:
        """Whether Python has to see the combined logits of every position that is decided."""
        return self.has_processors or self.records_logits

    @property
    def equality_decides(self) -> bool:
        """Whether a draft survives exactly where it is the token that the target would have drawn: then trees may."""
        return self.rule == "coupled" or (self._warp is not None and not self._warp.any_sampling)

    def warp(self, window: int) -> WarpParameters:
        """The rows' warp for a window of W positions."""
        assert self._warp is not None, "there are no rows"
        if not self.has_changing_bans:
            return self._warp
        return replace(self._warp, allowed=self._allowed(self.rows, window).to(self.device))

    def constrain(self, parameters: WarpParameters, drafts: Tensor) -> WarpParameters:
        """A warp that holds rows to their grammars as well.

        Args:
            parameters: of a window that reaches past the drafts.
            drafts: int64 [B, k].

        Returns:
            A warp for positions 0 .. k; `parameters` themselves where no row has a grammar.
        """
        if not self.has_grammars:
            return parameters
        count, size = drafts.shape[1] + 1, -(-self.vocab_size // 32)
        words = torch.full((len(self.rows), count, size), -1, dtype=torch.int32)
        for i, (row, tokens) in enumerate(zip(self.rows, drafts.tolist(), strict=True)):
            if row.law.grammar is not None:
                reach = row.remaining
                words[i] = allowed_words(row.law.grammar, row.tokens, tokens, row.eos_token_ids, reach, size)
        words = words.to(self.device)
        return replace(
            parameters, allowed=words if parameters.allowed is None else words & parameters.allowed[:, :count]
        )

    @cached_property
    def _shared_words(self) -> list[int] | None:
        return None if self._host_allowed is None else self._host_allowed[0, 0].tolist()

    def is_shared(self, token: int) -> bool:
        """Whether an id may be generated: no law of a window gives mass to any other."""
        if not 0 <= token < self.vocab_size:
            return False
        return self._shared_words is None or bool(self._shared_words[token // 32] >> token % 32 & 1)

    def process(self, logits: Tensor, drafts: Tensor, first: int, num_drafts: Tensor | None = None) -> Tensor:
        """Run the rows' processors.

        Left alone are positions that hold NaN, unless the row removes invalid values, and those behind an end token, a
        row's budget or drafts, or a draft that has no mass: their law is not read, and processors of a caller need not
        know such prefixes.

        Args:
            logits: [B, k, V] at window positions first .. first + k - 1.
            drafts: int64 [B, >= first + k - 1].
            first: window position of the first column.
            num_drafts: int64 [B], drafts of each row; every column of `drafts` counts by default.

        Returns:
            [B, k, V]; `logits` itself where no row has processors.
        """
        if not self.has_processors:
            return logits
        processed = logits.clone()
        counts = [drafts.shape[1]] * len(self.rows) if num_drafts is None else num_drafts.tolist()
        for i, (row, tokens) in enumerate(zip(self.rows, drafts.tolist(), strict=True)):
            if not row.law.processors:
                continue
            for k in range(min(logits.shape[1], counts[i] + 1 - first)):
                if first + k >= row.remaining or not row.eos_token_ids.isdisjoint(tokens[: first + k]):
                    break
                if k and processed[i, k - 1, tokens[first + k - 1]] == -inf:
                    break
                if row.law.removes_invalid or not bool(logits[i, k].isnan().any()):
                    prefix = row.prefix(tokens[: first + k]).to(logits.device)
                    processed[i, k] = row.law.process(prefix, logits[i, k])
        return processed

    def num_drafts(self, count: int) -> Tensor:
        """int64 [B], drafts of each row in a window of `count` of them: the last token of its budget is never one."""
        return (self.remaining - 1).minimum(self.most_drafts).clamp(0, count)

    def strengths(self, window: int, depth: Tensor | None = None) -> Tensor:
        """The pairs' alpha over the coming window.

        Args:
            window: W.
            depth: int64 [W], how many tokens each position stands behind the first; by default 0 .. W - 1.

        Returns:
            float64 [B, W, pairs].
        """
        if self._schedule is None:
            return self.alpha[:, None].expand(-1, window, -1)
        depth = torch.arange(window, device=self.device) if depth is None else depth
        return scheduled_strengths(self.alpha, self._schedule, self.start[:, None] + depth)

    def noise(self, fresh: bool = False) -> NoiseStream:
        """The noise of the cycle that starts now.

        Args:
            fresh: whether, where equality does not decide, no later cycle may come back to it: under `block` none does.
        """
        is_own = self.rule == "block" or (fresh and self.rule != "coupled")
        return NoiseStream(self.key, self.start, self.start if is_own else None)

    def commit(self, drafts: Tensor, num_accepted: Tensor, next_token: Tensor) -> Tensor:
        """Advance the device's side of every row by its accepted drafts and its next token, in place.

        Args:
            drafts: int64 [B, G].
            num_accepted, next_token: int64 [B].

        Returns:
            int64 [B], positions by which each row's caches advance; 0 for idle rows.
        """
        if self.seen is not None:
            for i in range(drafts.shape[1]):
                token = drafts[:, i : i + 1]
                self.seen.scatter_(1, token, self.seen.gather(1, token) | (num_accepted > i)[:, None])
            self.seen.scatter_(1, next_token[:, None], True)
        if self.counts is not None:
            for i in range(drafts.shape[1]):
                accepted = (num_accepted > i)[:, None].to(self.counts.dtype)
                self.counts.scatter_add_(1, drafts[:, i : i + 1], accepted)
            self.counts.scatter_add_(1, next_token[:, None], torch.ones_like(next_token[:, None], dtype=torch.int32))
        advance = (num_accepted + 1) * (self.remaining > 0)
        self.start += advance
        self.remaining.sub_(advance).clamp_(min=0)
        for pending in self.pending.values():
            pending.copy_(next_token)
        return advance
