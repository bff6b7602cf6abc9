"""Device functions of `specproxy_kernels.noise`: the same integers bit for bit, floats to an ulp."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["TILE", "NoiseKeys", "coins", "gumbel_of", "lane_word", "log1p", "tile_ids", "token_words", "words_at"]

TILE = tl.constexpr(1024)  # ids that share a run of counters, as four lanes of RUN ids
RUN = tl.constexpr(256)


class NoiseKeys(NamedTuple):
    """Where a launch's noise comes from: int64 [B] each; without blocks `block_start` stands in unread."""

    key: Tensor
    start: Tensor
    block_start: Tensor


@triton.jit
def _words(keys, row, offset, purpose, counter, BLOCKS: tl.constexpr):
    """Philox words of uint32 `counter` at window position `offset` (a scalar or of its shape): four uint32 tensors."""
    zero = tl.zeros_like(counter)
    index = (tl.load(keys.start + row) + offset).to(tl.uint32)
    nonce = zero
    if BLOCKS:
        nonce = zero + (tl.load(keys.block_start + row) + 1).to(tl.uint32)
    return tl.philox(tl.load(keys.key + row), counter, zero + index, zero + purpose, nonce)


@triton.jit
def tile_ids(first, COUNTERS: tl.constexpr):
    """Ids int32 [COUNTERS] of lane 0 of the tiles that begin at id `first`; lane l adds l * RUN."""
    counter = tl.arange(0, COUNTERS)
    return first + (counter // RUN) * TILE + counter % RUN


@triton.jit
def token_words(keys, row, offset, purpose, first, COUNTERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Words of the tiles from id `first` on: lane l of `tile_ids` takes word l."""
    counter = (first // TILE * RUN + tl.arange(0, COUNTERS)).to(tl.uint32)
    return _words(keys, row, offset, purpose, counter, BLOCKS)


@triton.jit
def lane_word(lane, w0, w1, w2, w3):
    """The word of lane 0 .. 3."""
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def words_at(keys, row, offset, purpose, ids, BLOCKS: tl.constexpr):
    """The word of each id, for scattered ids: four times the arithmetic of `token_words`."""
    counter = (ids // TILE * RUN + ids % RUN).to(tl.uint32)
    w0, w1, w2, w3 = _words(keys, row, offset, purpose, counter, BLOCKS)
    return lane_word(ids // RUN % 4, w0, w1, w2, w3)


@triton.jit
def _uniform(word):
    # 1 - 2^-24: float32(2^31 - 1) * 2^-31 rounds to 1, which a strict comparison must never see.
    return tl.minimum((word >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10, 0.999999940395355224609375)


@triton.jit
def log1p(x):
    """log(1 + x) to an ulp or two, by Kahan's correction of the rounding of 1 + x."""
    shifted = 1.0 + x
    # The quotient is 0/0 only where the other branch is taken.
    return tl.where(shifted == 1.0, x, tl.log(shifted) * (x / tl.where(shifted == 1.0, 1.0, shifted - 1.0)))


@triton.jit
def gumbel_of(word):
    """Standard Gumbel variables, float32, from 32-bit words: -log(-log1p(-u))."""
    # Half a step of the 31-bit grid, so that log(0) never appears.
    uniform = tl.maximum(_uniform(word), 2.3283064365386963e-10)
    return -tl.log(-log1p(-uniform))


@triton.jit
def coins(keys, row, COUNT: tl.constexpr, PURPOSE: tl.constexpr, BLOCKS: tl.constexpr):
    """Acceptance coins float32 [COUNT] at window positions 0 .. COUNT - 1."""
    offset = tl.arange(0, COUNT)
    word, _, _, _ = _words(keys, row, offset, PURPOSE, tl.zeros_like(offset).to(tl.uint32), BLOCKS)
    return _uniform(word)
