"""Logarithms of the combined law at given tokens. Knows nothing of models or requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specproxy.engine.handle import TokenLogprob

__all__ = ["token_logprobs"]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """What a law says of tokens, a position each.

    Args:
        logits: combined, [n, V].
        tokens: n ids; one that is not shared, V or above, has probability 0.
        top: how many of the likeliest tokens to name.

    Returns:
        One entry per position.
    """
    logprobs = logits.log_softmax(dim=-1)
    vocab_size = logits.shape[1]
    ids = torch.tensor(tokens, dtype=torch.long).to(logits.device)[:, None]
    own = logprobs.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill(ids >= vocab_size, -torch.inf)
    ranks = (logprobs > own).sum(dim=1) + 1
    best = logprobs.topk(min(top, vocab_size), dim=1)
    lines = zip(tokens, own[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, rank, tuple(zip(indices, values, strict=True)))
        for token, value, rank, indices, values in lines
    ]
