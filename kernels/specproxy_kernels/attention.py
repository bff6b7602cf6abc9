"""Attention of short ragged windows over a static key-value buffer: the torch reference and CPU path.

    out(b, h, t) = softmax over visible s of (scaling * q(b, h, t) . k(b, h // G, s)) v(b, h // G, s)

Key s is visible to query t of row b where s <= lengths[b] + t and, under a sliding window of w, s > lengths[b] + t - w.
Grouped-query heads are never expanded: the G query heads of one key head are folded into the query axis. This module
knows nothing of models or caches.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["window_attention", "window_bias"]


def window_bias(
    lengths: Tensor, window: int, num_keys: int, groups: int, dtype: torch.dtype, sliding_window: int | None = None
) -> Tensor:
    """Additive visibility of every key to every query of a ragged window.

    Args:
        lengths: int64 [B], keys of each row before the window.
        window: T, queries per row.
        num_keys: S, keys of the buffer that take part.
        groups: G, query heads per key head; the T rows are repeated G times.
        dtype: of the bias, that of the queries.
        sliding_window: keys visible to a query, itself included; None for all.

    Returns:
        [B, 1, G * T, S], 0 where visible, else -inf.
    """
    query = lengths[:, None] + torch.arange(window, device=lengths.device)  # [B, T]
    key = torch.arange(num_keys, device=lengths.device)
    visible = key <= query[..., None]  # [B, T, S]
    if sliding_window is not None:
        visible &= key > query[..., None] - sliding_window
    bias = torch.zeros(visible.shape, dtype=dtype, device=lengths.device).masked_fill_(~visible, -inf)
    return bias[:, None].repeat(1, 1, groups, 1)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Grouped-query attention of a window.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D], with H a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        bias: [B, 1, G * T, S] from `window_bias`; None where every key is visible, or with `causal`.
        scaling: factor on the dot products.
        softcap: c in c * tanh(x / c) on the scaled dot products (Gemma 2); None for none.
        causal: the keys are the window itself (T = S, no keys before it) and no bias is given.

    Returns:
        [B, T, H, D_v], contiguous.
    """
    batch, heads, window, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if causal and softcap is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return out.transpose(1, 2).contiguous()
    if causal:
        bias = window_bias(torch.zeros(1, dtype=torch.long, device=query.device), window, window, groups, query.dtype)
    folded = query.reshape(batch, kv_heads, groups * window, -1)
    if softcap is None:
        out = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scaling)
    else:
        scores = softcap * torch.tanh(folded @ key.transpose(2, 3) * (scaling / softcap))
        if bias is not None:
            scores = scores + bias
        out = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype) @ value
    return out.reshape(batch, heads, window, -1).transpose(1, 2).contiguous()
