"""Batches of unequal rows: left-padded prompts, and every role's logits over given continuations.

Plain forwards of the models, which know nothing of windows or caches: what they score is text that is already there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.errors import PromptError
from specproxy.schedule import CONSTANT, AlphaSchedule, scheduled_strengths
from specproxy.state import BASE
from specproxy.trio import Trio
from specproxy_kernels import combine_logits

__all__ = ["ContinuationLogits", "left_padded", "score_continuations"]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids as `generate` takes them.

    Args:
        rows: unpadded token ids.
        device: of the result.

    Returns:
        ids and attention mask, int64 [B, S] each.
    """
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass
class ContinuationLogits:
    """Logits that predict the T tokens of one continuation, each from its true prefix.

    Args:
        by_role: per role, [T, V] of its own width.
        target: the combined logits, [T, V] in float32 or wider; -inf at ids that are not shared.
    """

    by_role: dict[str, Tensor]
    target: Tensor


@torch.inference_mode()
def score_continuations(
    trio: Trio,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    continuations: Sequence[Sequence[int]],
    alpha: float | None = None,
    schedule: AlphaSchedule = CONSTANT,
) -> list[ContinuationLogits]:
    """One plain forward of every model over prompts and continuations.

    Args:
        trio: the models.
        prompts: per role, one prompt a row; a role without one of its own reads the base's.
        continuations: token ids of each row, at least one.
        alpha: of the first pair; its own by default. Further pairs keep theirs.
        schedule: how all strengths change over the tokens of a continuation.

    Raises:
        PromptError: an empty prompt or continuation.
    """
    for i, continuation in enumerate(continuations):
        if not continuation or any(not rows[i] for rows in prompts.values()):
            raise PromptError(f"row {i} has an empty prompt or continuation; give at least one token of each.")
    by_role: dict[str, list[Tensor]] = {}
    for role in trio.models:
        rows = [
            [*prompt, *continuation[:-1]]
            for prompt, continuation in zip(prompts.get(role, prompts[BASE]), continuations, strict=True)
        ]
        longest = max(map(len, rows))
        with trio.called(role) as model:
            # Padding stands on the right, where no token that counts looks.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits
        by_role[role] = [
            line[len(row) - len(continuation) : len(row)].to(trio.device)
            for line, row, continuation in zip(logits, rows, continuations, strict=True)
        ]
    allowed = trio.vocabulary.allowed
    allowed = None if allowed is None else allowed.to(trio.device)
    alphas = [pair.alpha for pair in trio.pairs]
    if alpha is not None:
        alphas[0] = alpha
    numbers = torch.tensor([alphas], dtype=torch.float64), torch.tensor([schedule.numbers], dtype=torch.float64)
    results = []
    for i, continuation in enumerate(continuations):
        own = {role: rows[i] for role, rows in by_role.items()}
        strengths = scheduled_strengths(*numbers, torch.arange(len(continuation))[None]).to(
            trio.device
        )  # [1, T, pairs]
        lines = {role: line[None] for role, line in own.items()}
        pairs = [pair.term(lines, strengths[..., number]) for number, pair in enumerate(trio.pairs)]
        target, _ = combine_logits(lines[BASE], pairs, trio.vocabulary.size, allowed)
        results.append(ContinuationLogits(own, target[0]))
    return results
