"""The entropy of a drafting model's law: how sure it is of its next token. Knows nothing of windows or policies."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expert_entropy"]


def expert_entropy(logits: Tensor, vocab_size: int) -> Tensor:
    """Shannon entropy of softmax(logits): of the model's own law, before processors, temperature and filters.

    It is the same measure under greedy decoding and sampling, and it follows from the prefix alone, not from the token
    that is drawn there.

    Args:
        logits: floating [B, k, V_draft], V_draft >= vocab_size.
        vocab_size: V, the shared vocabulary; wider logits are cut.

    Returns:
        [B, k] in nats, in promote(float32, logits); NaN where the logits are not usable.
    """
    cut = logits[..., :vocab_size]
    return torch.special.entr(cut.to(torch.promote_types(cut.dtype, torch.float32)).softmax(-1)).sum(-1)
