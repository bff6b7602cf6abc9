"""Split-KV attention of short ragged windows, and writes and moves of a window's keys and values, as Triton kernels.

    out(b, h, t) = softmax over visible s of score(b, h, t, s)  times  v(b, h // G, s)
    score        = scaling * q(b, h, t) . k(b, h // G, s), or c * tanh(that / c) under a soft-cap c

**Shape of the work.** The G query heads of a key head and the T queries of a window form the rows of one tile,
r = t * G + g, so that a key is read once for all of them. A program takes one key head of one sequence, one chunk of
`KEYS_PER_SPLIT` keys and one tile of rows; it walks its chunk in blocks with a running softmax in base 2. Chunks of a
row leave their maximum m, sum l and weighted values a, float32, in a workspace, and a second kernel adds

    M = max over chunks of m,   out = (sum of a * 2^(m - M)) / (sum of l * 2^(m - M))

**A row depends on nothing but itself.** Chunks and blocks begin at fixed multiples of a fixed size, whatever the
batch, its longest row and the buffer's capacity; chunks are added in order of position. A chunk that is empty,
or a block masked throughout, is an exact identity, so that neither the grid nor what is skipped can change a bit.
There are no atomics.

**No host synchronisation.** Lengths are read on the device; the grid follows from shapes alone, and chunks past a
row's own length exit at once. Both launches can be captured in a CUDA graph.

Windows of more than `MAX_SPLIT_WINDOW` queries (prefill) have their parallelism in the queries: they take as many tiles
as they need and one chunk of all keys, which leaves no workspace.

Keys and values past a row's own window are never read: what is stale there may be NaN.

This module checks nothing: `specproxy_kernels.attention` documents the operations, checks arguments and dispatches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FUSED_DTYPES", "KEYS_PER_SPLIT", "MAX_HEAD_DIM", "MAX_SPLIT_WINDOW", "attend", "compact", "write"]

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_SPLIT_WINDOW = 64
# Keys of a chunk. Part of the result's rounding, hence no function of anything that may vary between two calls for
# the same sequence. 256 keys of 128 bf16 are 128 KiB read for, at 16 rows, 8 KiB of partial results.
KEYS_PER_SPLIT = 256

_LOG2_E = 1.4426950408889634
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SPLITS_PER_STEP = 8  # partial results that the combine kernel has in flight
_WRITE_BLOCK = 16  # window positions that one program of the cache write copies


@triton.jit
def _dot(a, b, acc=None):
    # The interpreter keeps bfloat16 as its bit pattern and would multiply that; in float32 the products are the same.
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _popcount(word):
    """Number of set bits of int64 words. `>>` copies the sign: every mask cuts those copies off."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _tanh(x):
    """In terms of exp2: exact to about 1e-7 absolutely, and the same code in the interpreter and on a GPU."""
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _split_range(length, extent, num_keys, keys_per_split, sliding_window, SLIDING: tl.constexpr):
    """First chunk that any query of a row may see, and the one behind the last."""
    first = length * 0
    if SLIDING:
        # A query that is not even its own ancestor stands at length - 1 and sees sliding_window keys from there.
        first = tl.maximum(length - sliding_window, 0) // keys_per_split
    return first, (tl.minimum(length + extent, num_keys) + keys_per_split - 1) // keys_per_split


@triton.jit(do_not_specialize=["window", "extent", "num_keys", "keys_per_split", "sliding_window"])
def _attend_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    ancestors_ptr,
    out_ptr,  # [B, T, H, D_v], or the workspace [B * H_kv, splits, T * G, D_v] in float32
    max_ptr,  # [B * H_kv, splits, T * G]
    sum_ptr,
    window,
    extent,  # keys of the window: in a tree they may be more than its queries, which are the last ones
    num_keys,
    keys_per_split,
    sliding_window,
    score_scale,  # scaling * log2(e), or scaling / c under a soft-cap c
    softcap_scale,  # c * log2(e)
    kv_heads,
    query_batch_stride,
    query_head_stride,
    query_step_stride,
    query_dim_stride,
    keys_batch_stride,
    keys_head_stride,
    keys_stride,
    keys_dim_stride,
    values_batch_stride,
    values_head_stride,
    values_stride,
    values_dim_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TREE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (B * H_kv, splits, tiles): one chunk of keys against one tile of query rows."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    # The last tile sees most keys: start with it.
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    if SPLIT:
        first_split, end_split = _split_range(length, extent, num_keys, keys_per_split, sliding_window, SLIDING)
        if (split < first_split) | (split >= end_split):
            return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < window * GROUPS
    step = row // GROUPS
    dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_DV)
    is_dim = dim < HEAD_DIM
    is_value_dim = value_dim < VALUE_DIM
    query = tl.load(
        query_ptr
        + batch * query_batch_stride
        + (kv_head * GROUPS + row % GROUPS)[:, None] * query_head_stride
        + step[:, None] * query_step_stride
        + dim[None, :] * query_dim_stride,
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )

    # Keys from `begin` (a multiple of BLOCK_N) to before `end` hold all that this tile sees of the chunk.
    begin = split * keys_per_split
    if TREE:
        words = tl.load(ancestors_ptr + batch * extent + (extent - window) + step, mask=is_row, other=0)
        position = length + _popcount(words) - 1
        oldest = length - 1
        end = length + extent
    else:
        position = length + step
        oldest = length + tile * BLOCK_M // GROUPS
        end = length + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUPS + 1, window)
    end = tl.minimum(tl.minimum(end, num_keys), begin + keys_per_split)
    if SLIDING:
        begin = tl.maximum(begin, tl.maximum(oldest - sliding_window + 1, 0) // BLOCK_N * BLOCK_N)

    column = tl.arange(0, BLOCK_N)
    first_key = begin.to(tl.int64)
    # A scalar base moves from block to block; the offsets within a block fit 32 bits and stay.
    keys_ptr += batch * keys_batch_stride + kv_head * keys_head_stride + first_key * keys_stride
    values_ptr += batch * values_batch_stride + kv_head * values_head_stride + first_key * values_stride
    key_offset = column[None, :] * keys_stride + dim[:, None] * keys_dim_stride
    value_offset = column[:, None] * values_stride + value_dim[None, :] * values_dim_stride
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + column
        is_key = key < end
        keys = tl.load(keys_ptr + key_offset, mask=is_dim[:, None] & is_key[None, :], other=0.0)
        values = tl.load(values_ptr + value_offset, mask=is_key[:, None] & is_value_dim[None, :], other=0.0)
        keys_ptr += BLOCK_N * keys_stride
        values_ptr += BLOCK_N * values_stride

        scores = _dot(query, keys) * score_scale
        if SOFTCAP:
            scores = softcap_scale * _tanh(scores)
        key_position = key
        if TREE:
            slot = key - length  # place in the window; negative before it
            bit = tl.minimum(tl.maximum(slot, 0), 63).to(tl.int64)
            is_ancestor = ((words[:, None] >> bit[None, :]) & 1) != 0
            visible = is_key[None, :] & ((slot < 0)[None, :] | is_ancestor)
            if SLIDING:
                is_slot = is_key & (slot >= 0)
                key_words = tl.load(ancestors_ptr + batch * extent + slot, mask=is_slot, other=0)
                key_position = tl.where(is_slot, length + _popcount(key_words) - 1, key)
        else:
            visible = is_key[None, :] & (key[None, :] <= position[:, None])
        if SLIDING:
            visible &= key_position[None, :] > position[:, None] - sliding_window
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing visible yet: -inf - -inf is NaN
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(running_max - shift)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        acc = _dot(weights.to(values.dtype), values, acc * decay[:, None])
        running_max = new_max

    if SPLIT:
        place = (head.to(tl.int64) * tl.num_programs(1) + split) * (window * GROUPS) + row
        tl.store(max_ptr + place, running_max, mask=is_row)
        tl.store(sum_ptr + place, running_sum, mask=is_row)
    else:
        acc = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
        place = ((batch * window + step) * kv_heads + kv_head) * GROUPS + row % GROUPS
    tl.store(
        out_ptr + place[:, None] * VALUE_DIM + value_dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_value_dim[None, :],
    )


@triton.jit(do_not_specialize=["window", "extent", "num_keys", "num_splits", "keys_per_split", "sliding_window"])
def _combine_kernel(
    partial_ptr,  # [B * H_kv, splits, T * G, D_v]
    max_ptr,  # [B * H_kv, splits, T * G]
    sum_ptr,
    lengths_ptr,
    out_ptr,  # [B, T, H, D_v]
    window,
    extent,
    num_keys,
    num_splits,
    keys_per_split,
    sliding_window,
    kv_heads,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Grid (B * H_kv, T * G): the chunks of one query of one head, in order of position."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    first_split, end_split = _split_range(length, extent, num_keys, keys_per_split, sliding_window, SLIDING)

    value_dim = tl.arange(0, BLOCK_DV)
    is_value_dim = value_dim < VALUE_DIM
    row_max = float("-inf")
    row_sum = 0.0
    acc = tl.full([BLOCK_DV], 0.0, tl.float32)
    for start in tl.range(first_split, end_split, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        is_split = split < end_split
        place = (head.to(tl.int64) * num_splits + split) * (window * GROUPS) + row
        split_max = tl.load(max_ptr + place, mask=is_split, other=float("-inf"))
        split_sum = tl.load(sum_ptr + place, mask=is_split, other=0.0)
        partial = tl.load(
            partial_ptr + place[:, None] * VALUE_DIM + value_dim[None, :],
            mask=is_split[:, None] & is_value_dim[None, :],
            other=0.0,
        )
        new_max = tl.maximum(row_max, tl.max(split_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(split_max - shift)
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(split_sum * weights, 0)
        acc = acc * decay + tl.sum(partial * weights[:, None], 0)
        row_max = new_max

    step = row // GROUPS
    place = ((batch * window + step) * kv_heads + kv_head) * GROUPS + row % GROUPS
    tl.store(
        out_ptr + place * VALUE_DIM + value_dim,
        (acc / tl.where(row_sum == 0.0, 1.0, row_sum)).to(out_ptr.dtype.element_ty),
        mask=is_value_dim,
    )


@triton.jit(do_not_specialize=["window", "capacity"])
def _write_kernel(
    key_states_ptr,
    value_states_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    window,
    capacity,
    kv_heads,
    key_states_batch_stride,
    key_states_head_stride,
    key_states_stride,
    key_states_dim_stride,
    value_states_batch_stride,
    value_states_head_stride,
    value_states_stride,
    value_states_dim_stride,
    keys_batch_stride,
    keys_head_stride,
    keys_stride,
    keys_dim_stride,
    values_batch_stride,
    values_head_stride,
    values_stride,
    values_dim_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (B * H_kv, tiles of the window): keys and values of a tile to the row's own length."""
    head = tl.program_id(0)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    step = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    position = tl.load(lengths_ptr + batch) + step
    is_written = (step < window) & (position >= 0) & (position < capacity)

    dim = tl.arange(0, BLOCK_D)
    mask = is_written[:, None] & (dim < HEAD_DIM)[None, :]
    source = key_states_ptr + batch * key_states_batch_stride + kv_head * key_states_head_stride
    target = keys_ptr + batch * keys_batch_stride + kv_head * keys_head_stride
    states = tl.load(
        source + step[:, None] * key_states_stride + dim[None, :] * key_states_dim_stride, mask=mask, other=0.0
    )
    tl.store(target + position[:, None] * keys_stride + dim[None, :] * keys_dim_stride, states, mask=mask)

    dim = tl.arange(0, BLOCK_DV)
    mask = is_written[:, None] & (dim < VALUE_DIM)[None, :]
    source = value_states_ptr + batch * value_states_batch_stride + kv_head * value_states_head_stride
    target = values_ptr + batch * values_batch_stride + kv_head * values_head_stride
    states = tl.load(
        source + step[:, None] * value_states_stride + dim[None, :] * value_states_dim_stride, mask=mask, other=0.0
    )
    tl.store(target + position[:, None] * values_stride + dim[None, :] * values_dim_stride, states, mask=mask)


@triton.jit
def _compact_kernel(
    keys_ptr,
    values_ptr,
    lengths_ptr,
    slots_ptr,
    steps,
    kv_heads,
    keys_batch_stride,
    keys_head_stride,
    keys_stride,
    keys_dim_stride,
    values_batch_stride,
    values_head_stride,
    values_stride,
    values_dim_stride,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (B * H_kv): a path's keys and values, one position after the other.

    Slots rise along a path, so that a position is written only after it has been read.
    """
    head = tl.program_id(0)
    batch = (head // kv_heads).to(tl.int64)
    kv_head = (head % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + batch)
    key_dim = tl.arange(0, BLOCK_D)
    value_dim = tl.arange(0, BLOCK_DV)
    keys_ptr += batch * keys_batch_stride + kv_head * keys_head_stride + key_dim * keys_dim_stride
    values_ptr += batch * values_batch_stride + kv_head * values_head_stride + value_dim * values_dim_stride
    for step in range(steps):
        slot = tl.load(slots_ptr + batch * steps + step)
        moves = slot != step
        key = tl.load(keys_ptr + (length + slot) * keys_stride, mask=moves & (key_dim < HEAD_DIM), other=0.0)
        value = tl.load(values_ptr + (length + slot) * values_stride, mask=moves & (value_dim < VALUE_DIM), other=0.0)
        # A lane reads and writes the same dimensions throughout: no barrier is needed.
        tl.store(keys_ptr + (length + step) * keys_stride, key, mask=moves & (key_dim < HEAD_DIM))
        tl.store(values_ptr + (length + step) * values_stride, value, mask=moves & (value_dim < VALUE_DIM))


def _tiles(num_rows: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Sizes of a program, from what one model and window fix: never from the batch, the lengths or the capacity.

    Chosen so that no variant spills a register on sm_90, with 32 KiB or more of 16-bit keys and values on their way to
    each program, two of which fit on a multiprocessor (one, where heads of 256 meet 64 rows). float32 multiplies
    without tensor cores and keeps its tile small.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (head_dim, value_dim))
    widest = max(block_d, block_dv)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:
        block_m = 16
        block_n, num_warps, num_stages = (32, 4, 2) if widest <= 128 else (16, 8, 2)
    elif widest <= 64:
        block_n, num_warps, num_stages = 64, 4, 3
    elif widest <= 128:
        block_n, num_warps, num_stages = 32, 4, 4
    else:
        block_n, num_warps, num_stages = 32, 8, 3
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "num_warps": num_warps,
        "num_stages": num_stages,
        # Every operation rounds by itself: the variants of the kernel then agree on a row to the last bit.
        "enable_fp_fusion": False,
        # Left to itself, ptxas spills a few registers of 16-bit variants for one program more on a multiprocessor.
        "maxnreg": None if dtype == torch.float32 else 255,
    }


def attend(
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
    """`specproxy_kernels.ragged_attention` for dtypes of `FUSED_DTYPES` and heads of at most `MAX_HEAD_DIM`.

    Splits never depend on the lengths: a caller that wants one graph for a growing text passes whole buffers.
    """
    batch, heads, window, head_dim = query.shape
    kv_heads, num_keys, value_dim = values.shape[1:]
    groups = heads // kv_heads
    num_rows = groups * window
    extent = window if ancestors is None else ancestors.shape[1]
    out = query.new_empty(batch, window, heads, value_dim)
    if out.numel() == 0:
        return out
    tiles = _tiles(num_rows, head_dim, value_dim, query.dtype)
    keys_per_split = KEYS_PER_SPLIT if window <= MAX_SPLIT_WINDOW else num_keys
    num_splits = triton.cdiv(num_keys, keys_per_split)
    is_split = num_splits > 1
    if is_split:
        partial = out.new_empty(batch * kv_heads, num_splits, num_rows, value_dim, dtype=torch.float32)
        maxima, sums = out.new_empty(2, batch * kv_heads, num_splits, num_rows, dtype=torch.float32)
    else:
        partial = maxima = sums = out  # the last two are not touched
    grid = (batch * kv_heads, num_splits, triton.cdiv(num_rows, tiles["BLOCK_M"]))
    with torch.cuda.device_of(query):
        _attend_kernel[grid](
            query,
            keys,
            values,
            lengths.contiguous(),
            lengths if ancestors is None else ancestors.contiguous(),
            partial,
            maxima,
            sums,
            window,
            extent,
            num_keys,
            keys_per_split,
            sliding_window or 0,
            scaling * _LOG2_E if softcap is None else scaling / softcap,
            _LOG2_E if softcap is None else softcap * _LOG2_E,
            kv_heads,
            *query.stride(),
            *keys.stride(),
            *values.stride(),
            GROUPS=groups,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            SLIDING=sliding_window is not None,
            SOFTCAP=softcap is not None,
            TREE=ancestors is not None,
            SPLIT=is_split,
            **tiles,
        )
        if is_split:
            _combine_kernel[(batch * kv_heads, num_rows)](
                partial,
                maxima,
                sums,
                lengths.contiguous(),
                out,
                window,
                extent,
                num_keys,
                num_splits,
                keys_per_split,
                sliding_window or 0,
                kv_heads,
                GROUPS=groups,
                VALUE_DIM=value_dim,
                SLIDING=sliding_window is not None,
                BLOCK_DV=tiles["BLOCK_DV"],
                BLOCK_SPLITS=_SPLITS_PER_STEP,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return out


def write(key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """`specproxy_kernels.write_window`, in one launch; any dtype."""
    batch, kv_heads, window, head_dim = key_states.shape
    value_dim = value_states.shape[3]
    if key_states.numel() == 0 and value_states.numel() == 0:
        return
    with torch.cuda.device_of(keys):
        _write_kernel[(batch * kv_heads, triton.cdiv(window, _WRITE_BLOCK))](
            key_states,
            value_states,
            keys,
            values,
            lengths.contiguous(),
            window,
            keys.shape[2],
            kv_heads,
            *key_states.stride(),
            *value_states.stride(),
            *keys.stride(),
            *values.stride(),
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_T=_WRITE_BLOCK,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_DV=triton.next_power_of_2(value_dim),
            num_warps=4,
        )


def compact(keys: Tensor, values: Tensor, lengths: Tensor, slots: Tensor) -> None:
    """`specproxy_kernels.compact_window`, in one launch; any dtype."""
    batch, kv_heads, _, head_dim = keys.shape
    value_dim = values.shape[3]
    if batch * kv_heads == 0 or slots.shape[1] == 0:
        return
    with torch.cuda.device_of(keys):
        _compact_kernel[(batch * kv_heads,)](
            keys,
            values,
            lengths.contiguous(),
            slots.contiguous(),
            slots.shape[1],
            kv_heads,
            *keys.stride(),
            *values.stride(),
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_DV=triton.next_power_of_2(value_dim),
            num_warps=4,
        )
