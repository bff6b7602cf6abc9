"""Attention of short ragged windows over a static key-value buffer, and writes and moves of a window in it.

    out(b, h, t) = softmax over visible s of (scaling * q(b, h, t) . k(b, h // G, s)) v(b, h // G, s)

`ragged_attention`, `write_window` and `compact_window` are the operations: they check their arguments and run the
Triton kernels of `fused.attention` or the torch references here (see `dispatch`). `window_bias` and `window_attention`
are the parts of the reference, for callers that share one bias between layers. This module knows nothing of models or
caches.

**Which keys a query sees.** Row b holds lengths[b] keys, its prefix, and behind them the keys of its window of T.
Logical positions decide:

    prefix key s               position s
    window key or query j      position lengths[b] + depth(j)

In a chain, depth(j) = j, and query t sees what stands at its own position or before. In a token tree, bit j of the
word ancestors[b, t] says that query t sees window key j, itself included; depth(j) is the number of set bits of j's
own word, less one; the prefix is seen whole. A tree may be read in several pieces: its window then holds the keys of K
tokens, of which the queries are the last T. Under a sliding window of w, in chain and tree alike, query t sees of all
that only what stands less than w positions before its own. What lies behind a row's window is never seen.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specproxy_kernels.dispatch import kernel_path

__all__ = [
    "MAX_TREE_WINDOW",
    "compact_window",
    "compact_window_reference",
    "ragged_attention",
    "ragged_attention_reference",
    "window_attention",
    "window_bias",
    "write_window",
    "write_window_reference",
]

MAX_TREE_WINDOW = 64  # bits of an ancestor word


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention of a window of T tokens a row, whose keys and values already stand in the buffers.

    | argument | shape | dtype | strides |
    | --- | --- | --- | --- |
    | `query` | [B, H, T, D] | fp16, bf16, fp32 or fp64 | any |
    | `keys` | [B, H_kv, S, D], H a multiple of H_kv | the query's | any; views of a larger buffer are meant |
    | `values` | [B, H_kv, S, D_v] | the query's | any, also other than the keys' |
    | `lengths` | [B] | int64 | any |
    | `ancestors` | [B, K], T <= K <= 64 | int64 | any |

    The kernel reads lengths[b] + T keys and values of each row, or about sliding_window + T of them, each once for
    every 64 query rows (T * H / H_kv; 16 in float32): its floor is

        bytes = element size * H_kv * (D + D_v) * sum over b of (lengths[b] + T)

    over the memory's bandwidth. Its partial results take 4 * B * H * T * (D_v + 2) bytes for every 256 keys of S.

    Args:
        query: of the window's tokens.
        keys, values: buffers of S positions; the window's own stand at lengths[b] .. lengths[b] + T (K in a tree). What
            lies behind is ignored, whatever it holds.
        lengths: keys of each row before the window, on the query's device; lengths[b] + T <= S, or K in a tree. Never
            read by the host.
        scaling: factor on the dot products.
        softcap: c in c * tanh(x / c) on the scaled dot products (Gemma 2); None for none.
        sliding_window: positions that a query sees, its own included; None for all.
        ancestors: words of a token tree's keys, the last T of which are the queries' (see the module); None for a
            chain.

    Returns:
        [B, T, H, D_v], contiguous, in the query's dtype; zeros for a query that sees no key. Scores and sums are
        float32 (the reference: the inputs' dtype, float32 in its softmax). On the kernel path a row's result depends
        on T and on the row's own query, keys and values alone: not one bit changes with B, with other rows, with S
        or with what is stale. That holds while T <= 64; longer windows take one pass over the row's keys, with the
        same promise among themselves.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a softcap or sliding window that is not positive, a tree
            of more than 64 tokens.

    float64, and heads of more than 256, take the reference on every device. No gradients on the kernel path.

    Example:
        >>> keys, values = torch.randn(2, 1, 8, 2, 16).unbind()  # B = 1, H_kv = 8, S = 2, D = 16
        >>> out = ragged_attention(torch.randn(1, 32, 2, 16), keys, values, torch.tensor([0]), scaling=0.25)
        >>> out.shape
        torch.Size([1, 2, 32, 16])

    Sources: the split of the keys is that of Flash-Decoding (Dao et al. 2023); tree masks, SpecInfer (Miao et al.
    2024, arXiv 2305.09781).
    """
    _check_attention(query, keys, values, lengths, softcap, sliding_window, ancestors)
    if kernel_path(query.device) == "triton":
        # Imported here, since triton is optional and chooses its interpreter when it is imported.
        from specproxy_kernels.fused.attention import FUSED_DTYPES, MAX_HEAD_DIM, attend

        if query.dtype in FUSED_DTYPES and max(query.shape[-1], values.shape[-1]) <= MAX_HEAD_DIM:
            return attend(
                query,
                keys,
                values,
                lengths,
                scaling=scaling,
                softcap=softcap,
                sliding_window=sliding_window,
                ancestors=ancestors,
            )
    return ragged_attention_reference(
        query,
        keys,
        values,
        lengths,
        scaling=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
        ancestors=ancestors,
    )


def ragged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """`ragged_attention` in torch, without its checks."""
    window, num_keys, groups = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    bias = window_bias(lengths, window, num_keys, groups, query.dtype, sliding_window, ancestors)
    # A weight of zero does not hide a NaN.
    extent = window if ancestors is None else ancestors.shape[1]
    is_stale = (torch.arange(num_keys, device=lengths.device) >= lengths[:, None] + extent)[:, None, :, None]
    keys, values = keys.masked_fill(is_stale, 0), values.masked_fill(is_stale, 0)
    out = window_attention(query, keys, values, bias, scaling=scaling, softcap=softcap)
    sees_nothing = (bias[:, 0, :window] == -inf).all(-1)  # [B, T], the same in every group
    return out.masked_fill_(sees_nothing[..., None, None], 0)


def window_bias(
    lengths: Tensor,
    window: int,
    num_keys: int,
    groups: int,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    ancestors: Tensor | None = None,
) -> Tensor:
    """Additive visibility of every key to every query of a ragged window.

    Args:
        lengths: int64 [B], keys of each row before the window.
        window: T, queries per row.
        num_keys: S, keys of the buffer that take part.
        groups: G, query heads per key head; the T rows are repeated G times.
        dtype: of the bias, that of the queries.
        sliding_window: positions that a query sees, its own included; None for all.
        ancestors: int64 [B, K], the words of a token tree, T <= K <= 64, whose last T are the queries'; None for a
            chain.

    Returns:
        [B, 1, G * T, S], 0 where visible, else -inf.
    """
    key = torch.arange(num_keys, device=lengths.device)
    key_position = key.expand(lengths.shape[0], -1)  # [B, S]
    if ancestors is None:
        position = lengths[:, None] + torch.arange(window, device=lengths.device)  # [B, T]
        visible = key <= position[..., None]  # [B, T, S]
    else:
        bits = torch.arange(MAX_TREE_WINDOW, device=lengths.device)
        extent = ancestors.shape[1]
        positions = lengths[:, None] + ((ancestors[..., None] >> bits) & 1).sum(-1) - 1  # [B, K]
        position = positions[:, extent - window :]
        slot = key - lengths[:, None]  # [B, S], place in the window, negative before it
        place = slot.clamp(0, extent - 1)
        is_ancestor = (ancestors[:, extent - window :, None] >> place[:, None]) & 1 == 1
        visible = (slot < 0)[:, None] | (is_ancestor & (slot < extent)[:, None])
        key_position = torch.where(slot < 0, key, positions.gather(1, place))
    if sliding_window is not None:
        visible = visible & (key_position[:, None] > position[..., None] - sliding_window)
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


def write_window(key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Write a window's keys and values into the buffers, each row's at its own length; positions past S are dropped.

    | argument | shape | dtype | strides |
    | --- | --- | --- | --- |
    | `key_states` | [B, H_kv, T, D] | any | any |
    | `value_states` | [B, H_kv, T, D_v] | any | any |
    | `keys` | [B, H_kv, S, D] | of `key_states` | any; no two elements may share memory |
    | `values` | [B, H_kv, S, D_v] | of `value_states` | likewise |
    | `lengths` | [B] | int64, on the same device | any |

    The kernel takes one launch for both buffers and never synchronises with the host. Its floor is twice the bytes of
    the states over the memory's bandwidth.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> keys, values = torch.zeros(2, 1, 2, 6, 4).unbind()
        >>> write_window(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), keys, values, torch.tensor([2]))
        >>> keys[0, 0, :, 0].tolist()
        [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    """
    for states, buffer, name in ((key_states, keys, "keys"), (value_states, values, "values")):
        if buffer.ndim != 4 or states.shape != (*buffer.shape[:2], key_states.shape[2], buffer.shape[3]):
            raise ValueError(f"{name}={tuple(buffer.shape)} and their states {tuple(states.shape)} do not fit.")
        if buffer.dtype != states.dtype:
            raise ValueError(f"{name} of {buffer.dtype} and states of {states.dtype}: convert one of them.")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys={tuple(keys.shape)} and values={tuple(values.shape)}: only D and D_v may differ.")
    _check_lengths(lengths, keys)
    if kernel_path(keys.device) == "triton":
        from specproxy_kernels.fused.attention import write

        write(key_states, value_states, keys, values, lengths)
    else:
        write_window_reference(key_states, value_states, keys, values, lengths)


def write_window_reference(
    key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> None:
    """`write_window` in torch, without its checks; it synchronises with the host."""
    position = lengths[:, None] + torch.arange(key_states.shape[2], device=lengths.device)  # [B, T]
    row, step = ((position >= 0) & (position < keys.shape[2])).nonzero(as_tuple=True)
    for states, buffer in ((key_states, keys), (value_states, values)):
        buffer[row, :, position[row, step]] = states[row, :, step]


def compact_window(keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """Move a path through a window to the window's beginning: what stands at lengths + slots[:, j] goes to lengths + j.

    | argument | shape | dtype | strides |
    | --- | --- | --- | --- |
    | `keys` | [B, H_kv, S, D] | any | any; no two elements may share memory |
    | `values` | [B, H_kv, S, D_v] | any | likewise |
    | `lengths` | [B] | int64, on the same device | any |
    | `slots` | [B, P] | int64, on the same device | any |

    The kernel takes one launch for both buffers and never synchronises with the host. Its floor is twice the bytes that
    move over the memory's bandwidth.

    Args:
        keys, values: buffers of S positions.
        lengths: keys of each row before its window.
        slots: places in the window, each row's rising; lengths[b] + slots[b, j] < S.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> keys, values = torch.arange(6.0).expand(2, 1, 1, 6)[..., None].clone().unbind()
        >>> compact_window(keys, values, torch.tensor([1]), torch.tensor([[0, 2, 4]]))
        >>> keys.flatten().tolist()
        [0.0, 1.0, 3.0, 5.0, 4.0, 5.0]
    """
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys={tuple(keys.shape)} and values={tuple(values.shape)}: only D and D_v may differ.")
    _check_lengths(lengths, keys)
    if slots.ndim != 2 or slots.shape[0] != keys.shape[0] or slots.dtype != torch.int64 or slots.device != keys.device:
        raise ValueError(
            f"slots={tuple(slots.shape)} of {slots.dtype} on {slots.device}: int64 [{keys.shape[0]}, P] on "
            f"{keys.device} is needed."
        )
    if kernel_path(keys.device) == "triton":
        from specproxy_kernels.fused.attention import compact

        compact(keys, values, lengths, slots)
    else:
        compact_window_reference(keys, values, lengths, slots)


def compact_window_reference(keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """`compact_window` in torch, without its checks; it synchronises with the host."""
    row, step = (slots != torch.arange(slots.shape[1], device=slots.device)).nonzero(as_tuple=True)
    target, source = lengths[row] + step, lengths[row] + slots[row, step]
    for buffer in (keys, values):
        buffer[row, :, target] = buffer[row, :, source]


def _check_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    softcap: float | None,
    sliding_window: int | None,
    ancestors: Tensor | None,
) -> None:
    shapes = f"query={tuple(query.shape)}, keys={tuple(keys.shape)}, values={tuple(values.shape)}"
    if query.ndim != 4 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(f"{shapes}: four dimensions are needed.")
    batch, heads, window, head_dim = query.shape
    if keys.shape[:3] != values.shape[:3] or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(f"{shapes}: [B, H, T, D], [B, H_kv, S, D] and [B, H_kv, S, D_v] are needed.")
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"{shapes}: the query's heads must be a multiple of the keys'.")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"query of {query.dtype}, keys of {keys.dtype}, values of {values.dtype}: one dtype is needed."
        )
    if not query.device == keys.device == values.device:
        raise ValueError(f"query on {query.device}, keys on {keys.device}, values on {values.device}: move them.")
    _check_lengths(lengths, keys)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: give a positive number, or None for none.")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: give at least 1, or None for all keys.")
    if ancestors is not None:
        fits = ancestors.ndim == 2 and ancestors.shape[0] == batch and ancestors.shape[1] >= window
        if not fits or ancestors.dtype != torch.int64 or ancestors.device != query.device:
            raise ValueError(
                f"ancestors={tuple(ancestors.shape)} of {ancestors.dtype} on {ancestors.device}: int64 "
                f"[{batch}, >= {window}] on {query.device} is needed."
            )
        if ancestors.shape[1] > MAX_TREE_WINDOW:
            raise ValueError(
                f"ancestors for a window of {ancestors.shape[1]}: a tree has at most {MAX_TREE_WINDOW} tokens."
            )


def _check_lengths(lengths: Tensor, keys: Tensor) -> None:
    if lengths.shape != keys.shape[:1] or lengths.dtype != torch.int64 or lengths.device != keys.device:
        raise ValueError(
            f"lengths={tuple(lengths.shape)} of {lengths.dtype} on {lengths.device}: int64 [{keys.shape[0]}] on "
            f"{keys.device} is needed."
        )
