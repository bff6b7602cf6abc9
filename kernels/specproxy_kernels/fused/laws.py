"""Device functions of `specproxy_kernels.laws`: a token's warped logit, recomputed wherever it is needed.

No intermediate of the vocabulary's size is ever written: every pass loads the raw logits and repeats the elementwise
arithmetic, which costs less than the bytes. Order and rounding of the operations are the reference's, so that equal
inputs give equal bits (the launches switch off fused multiply-add).
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "ALLOWED",
    "BIAS",
    "COUNTS",
    "REPETITION",
    "SAMPLING",
    "Law",
    "LogitRows",
    "Pair",
    "Prefix",
    "Warp",
    "first_largest",
    "is_greedy",
    "scaled_logits",
]

# Bits of FEATURES: what some row of the batch uses.
ALLOWED = tl.constexpr(1)
BIAS = tl.constexpr(2)
REPETITION = tl.constexpr(4)
COUNTS = tl.constexpr(8)
SAMPLING = tl.constexpr(16)

INFINITY = tl.constexpr(inf)
NO_ID = tl.constexpr(2**31 - 1)


class LogitRows(NamedTuple):
    """Logits [B, W, V_any]: contiguous along V, any other strides (in elements)."""

    pointer: Tensor
    row_stride: int
    position_stride: int


class Pair(NamedTuple):
    """One expert and anti-expert; alpha is [B, W]. Without an anti-expert (see ANTI) its field stands in unread."""

    expert: LogitRows
    anti_expert: LogitRows
    alpha: Tensor
    alpha_row_stride: int
    alpha_position_stride: int


class Warp(NamedTuple):
    """`WarpParameters` on the device; a field that FEATURES or FILTERS leaves out stands in unread."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    seen: Tensor
    seen_stride: int
    frequency_penalty: Tensor
    presence_penalty: Tensor
    counts: Tensor
    counts_stride: int
    bias: Tensor
    bias_stride: int
    allowed: Tensor
    allowed_row_stride: int
    allowed_position_stride: int


class Prefix(NamedTuple):
    """The cycle's drafts int64 [B, length], of which a window position w has the first w before it."""

    drafts: Tensor
    length: int


class Law(NamedTuple):
    """All that a token's warped logit is made from."""

    base: LogitRows
    pairs: tuple[Pair, ...]
    warp: Warp
    prefix: Prefix


@triton.jit
def _load(rows, row, position, ids, inside, COMPUTE: tl.constexpr):
    pointer = rows.pointer + row.to(tl.int64) * rows.row_stride + position * rows.position_stride
    return tl.load(pointer + ids, mask=inside, other=-INFINITY).to(COMPUTE)


@triton.jit
def _combined(law, row, position, ids, inside, ANTI: tl.constexpr, COMPUTE: tl.constexpr):
    """Combined logits s of `combine_logits`, and where they are NaN or +inf."""
    s = _load(law.base, row, position, ids, inside, COMPUTE)
    masked = s == -INFINITY
    for i in tl.static_range(len(law.pairs)):
        pair = law.pairs[i]
        difference = _load(pair.expert, row, position, ids, inside, COMPUTE)
        masked = masked | (difference == -INFINITY)
        if (ANTI >> i) & 1:
            difference = difference - _load(pair.anti_expert, row, position, ids, inside, COMPUTE)
        # Infinities that the expert's mask does not explain become NaN, so that no alpha (0, negative) can hide them.
        difference = tl.where(tl.abs(difference) == INFINITY, float("nan"), difference)
        alpha = tl.load(pair.alpha + row * pair.alpha_row_stride + position * pair.alpha_position_stride).to(COMPUTE)
        s = s + alpha * difference
    s = tl.where(masked, -INFINITY, s)
    return s, (s != s) | (s == INFINITY)


@triton.jit
def _earlier(law, row, position, ids):
    """How often each id stands among the drafts before the position, int32."""
    times = tl.zeros_like(ids)
    for j in range(law.prefix.length):
        draft = tl.load(law.prefix.drafts + row * law.prefix.length + j)
        times += ((ids == draft) & (position > j)).to(tl.int32)
    return times


@triton.jit
def _quotient(x, y, COMPUTE: tl.constexpr):
    # `/` is approximate in float32, and `div_rn` knows float32 alone.
    if tl.float32 == COMPUTE:
        quotient = tl.div_rn(x, tl.zeros_like(x) + y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def is_greedy(law, row):
    """Whether a row's temperature is 0."""
    return tl.load(law.warp.temperature + row) == 0


@triton.jit
def scaled_logits(law, row, position, ids, inside, ANTI: tl.constexpr, FEATURES: tl.constexpr, COMPUTE: tl.constexpr):
    """z of `penalised`: combined logits behind masks, penalties and temperature.

    Args:
        law: a `Law`.
        row: scalar, of the batch.
        position: window position, a scalar or of the shape of `ids`.
        ids: int32.
        inside: whether an id is below V; z is -inf elsewhere.

    Returns:
        z in COMPUTE, and where the combined logits were NaN or +inf.
    """
    warp = law.warp
    z, bad = _combined(law, row, position, ids, inside, ANTI, COMPUTE)
    if ALLOWED & FEATURES:
        words = warp.allowed + row * warp.allowed_row_stride + position * warp.allowed_position_stride + ids // 32
        bits = tl.load(words, mask=inside, other=0) >> (ids % 32)
        z = tl.where((bits & 1) != 0, z, -INFINITY)
    if BIAS & FEATURES:
        z = z + tl.load(warp.bias + row.to(tl.int64) * warp.bias_stride + ids, mask=inside, other=0).to(COMPUTE)
    if (REPETITION | COUNTS) & FEATURES:
        earlier = _earlier(law, row, position, ids)
        if REPETITION & FEATURES:
            penalty = tl.load(warp.repetition_penalty + row).to(COMPUTE)
            seen = tl.load(warp.seen + row.to(tl.int64) * warp.seen_stride + ids, mask=inside, other=0) != 0
            penalised = tl.where(z < 0, z * penalty, _quotient(z, penalty, COMPUTE))
            z = tl.where(seen | (earlier > 0), penalised, z)
        if COUNTS & FEATURES:
            counts = warp.counts + row.to(tl.int64) * warp.counts_stride + ids
            times = tl.load(counts, mask=inside, other=0) + earlier
            frequency = tl.load(warp.frequency_penalty + row).to(COMPUTE)
            presence = tl.load(warp.presence_penalty + row).to(COMPUTE)
            z = z - frequency * times.to(COMPUTE)
            z = z - tl.where(times > 0, presence, 0.0)
    if SAMPLING & FEATURES:
        temperature = tl.load(warp.temperature + row).to(COMPUTE)
        z = _quotient(z, tl.where(temperature == 0, 1.0, temperature), COMPUTE)
    return z, bad


@triton.jit
def first_largest(key, ids):
    """The largest key of a vector and the smallest id that has it; `NO_ID` where all keys are NaN or absent."""
    best = tl.max(key, 0)
    return best, tl.min(tl.where(key == best, ids, NO_ID), 0)
