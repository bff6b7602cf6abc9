"""What several end-to-end tests share: prompts per role, memorised oracle rows, a recording streamer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import tiny
import torch
from transformers import LogitsProcessor

from specproxy.trio import Trio

#: Fills padded prompt columns: an ordinary id, so that padding which is read by mistake changes the text.
FILLER = tiny.VOCAB_SIZE - 1
#: Fills rows that have ended.
PAD = 0

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RolePrompts:
    """One prompt a row for the base, and for expert and anti-expert where they read their own."""

    base: Rows
    expert: Rows | None = None
    anti_expert: Rows | None = None

    def row(self, index: int) -> RolePrompts:
        """The prompts of one row alone."""
        expert = (self.expert[index],) if self.expert else None
        anti_expert = (self.anti_expert[index],) if self.anti_expert else None
        return RolePrompts((self.base[index],), expert, anti_expert)

    def kwargs(self) -> dict[str, torch.Tensor]:
        """Arguments of `generate` with these prompts, left-padded; the expert gets two columns of padding too many."""
        ids, mask = tiny.left_pad([list(row) for row in self.base], pad=FILLER)
        arguments = {"input_ids": ids, "attention_mask": mask}
        for role, rows, extra in (("expert", self.expert, 2), ("anti_expert", self.anti_expert, 0)):
            if rows:
                ids, mask = tiny.left_pad([list(row) for row in rows], pad=FILLER, extra=extra)
                arguments |= {f"{role}_input_ids": ids, f"{role}_attention_mask": mask}
        return arguments


def role_prompts(
    base: list[int],
    expert: list[int] | None = None,
    anti_expert: list[int] | None = None,
    seed: int = 0,
) -> RolePrompts:
    """Random prompts of these lengths."""

    def rows(lengths: list[int] | None, offset: int) -> Rows | None:
        return tuple(map(tuple, tiny.prompts(lengths, seed=10 * seed + offset))) if lengths else None

    own = rows(base, 0)
    assert own is not None
    return RolePrompts(own, rows(expert, 1), rows(anti_expert, 2))


@functools.cache
def _long_row(
    kind: str, pair_kind: str | None, prompts: RolePrompts, alpha: float, repetition_penalty: float, length: int
) -> tuple[int, ...]:
    trio = tiny.shared_trio(kind, pair_kind)
    margins: list[float] = []
    tokens = oracle.plain_greedy(
        trio.models,
        prompts.base[0],
        expert_prompt=prompts.expert and prompts.expert[0],
        anti_expert_prompt=prompts.anti_expert and prompts.anti_expert[0],
        max_new_tokens=length,
        alpha=alpha,
        repetition_penalty=repetition_penalty,
        margins=margins,
    )
    if trio.base.dtype == torch.float32 or "gemma2" in trio.kind:  # Gemma 2 works in float32 inside
        assert min(margins) > 1e-4, f"a near-tie ({min(margins)}): choose another seed for {kind}"
    return tuple(tokens)


def greedy_rows(
    kind: str,
    prompts: RolePrompts,
    *,
    pair_kind: str | None = None,
    alpha: float = 1.0,
    repetition_penalty: float = 1.0,
    length: int = 20,
) -> list[list[int]]:
    """The oracle's greedy tokens of `tiny.shared_trio` for each row, without end of text; computed once a run."""
    return [
        list(_long_row(kind, pair_kind, prompts.row(index), alpha, repetition_penalty, length))
        for index in range(len(prompts.base))
    ]


@dataclass
class Recorder:
    """A streamer that keeps what it is given."""

    chunks: list[Any] = field(default_factory=list)
    ends: int = 0

    def put(self, value: torch.Tensor) -> None:
        assert self.ends == 0, "put after end"
        self.chunks.append(value.clone())

    def end(self) -> None:
        self.ends += 1

    def ids(self, start: int = 0) -> list[int]:
        """All ids from one chunk on, flattened."""
        return [int(token) for chunk in self.chunks[start:] for token in chunk.flatten()]


class FavourOdd(LogitsProcessor):
    """A processor of the caller's own: cycles need the host for it, and its results reach kernels as dense rows."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, 1::2] += 0.5 + 0.1 * (input_ids.shape[1] % 3)
        return scores


def use_policy(monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    """Let "auto" mean this policy."""

    class Given:
        def __enter__(self) -> Any:
            return policy

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(Trio, "policy", lambda self, drafters, captured: Given())
