"""Device functions of the filters: top-k, top-p and min-p of one row, exact for every law, by one program.

The kept set is {z >= tau}, ties included. The search for tau works on integer keys that order as the logits do:

    narrow    a bracket lo <= key(tau) < hi shrinks ninefold with each pass over the row, which counts (top-k) or sums
              the mass of (top-p) the ids at or above eight pivots; the first pivots lie at fixed distances below the
              largest logit, where the answer is found nearly always
    gather    as soon as at most CANDIDATES ids lie at or above lo, they are written to a list, and everything else
              happens in registers
    settle    the bracket shrinks to the last kept logit; what is kept is summed and raced. A kept set that is larger
              than the list is settled by further passes over the row

A pass costs as many bytes as the raw logits have. Usual laws take two.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused.laws import INFINITY, first_largest, is_greedy, scaled_logits
from specproxy_kernels.fused.noise import words_at
from specproxy_kernels.fused.rows import race_key

__all__ = ["CANDIDATES", "MIN_P", "TOP_K", "TOP_P", "Candidates", "filter_row"]

# Bits of FILTERS: what some row of the batch uses.
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(4)

CANDIDATES = tl.constexpr(512)
_PIVOTS = tl.constexpr(8)
_BLOCK = tl.constexpr(512)


class Candidates(NamedTuple):
    """Lists of one row each, [rows, CANDIDATES]: z and ids."""

    z: Tensor
    id: Tensor


@triton.jit
def _to_key(z, COMPUTE: tl.constexpr):
    """int64 keys that order as floats do."""
    if tl.float32 == COMPUTE:
        bits = z.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    else:
        bits = z.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return key


@triton.jit
def _from_key(key, COMPUTE: tl.constexpr):
    if tl.float32 == COMPUTE:
        bits = key.to(tl.int32)
        z = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        z = (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    return z


@triton.jit
def _count(z, inside, pivot, largest):
    """Whether each z lies at or above each pivot, int32 [N, PIVOTS], and its exp(z - largest) where it does."""
    above = (z[:, None] >= pivot[None, :]) & inside[:, None]
    return above.to(tl.int32), tl.where(above, tl.exp(z - largest)[:, None], 0.0)


@triton.jit
def _at_or_above(
    law,
    row,
    position,
    listed,
    pivot,
    largest,
    size,
    LISTED: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """How many of `size` logits lie at or above each pivot, and the sum of exp(z - largest) over them.

    With LISTED they are the first of the vector `listed`, else those of the row.
    """
    if LISTED:
        count, mass = _count(listed, tl.arange(0, CANDIDATES) < size, pivot, largest)
    else:
        count = tl.zeros([_BLOCK, _PIVOTS], tl.int32)
        mass = tl.zeros([_BLOCK, _PIVOTS], COMPUTE)
        for first in range(0, size, _BLOCK):
            ids = first + tl.arange(0, _BLOCK)
            z, _ = scaled_logits(law, row, position, ids, ids < size, ANTI, FEATURES, COMPUTE)
            block_count, block_mass = _count(z, ids < size, pivot, largest)
            count += block_count
            mass += block_mass
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _narrow(
    law,
    row,
    position,
    listed,
    largest,
    lo,
    count,
    mass,
    least_count,
    least_mass,
    few,
    size,
    LISTED: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Raise lo to the largest key at or above which there are `least_count` ids and `least_mass` of exp(z - largest).

    Ends early as soon as at most `few` ids lie at or above lo. Returns lo with the count and mass there.
    """
    j = tl.arange(0, _PIVOTS) + 1
    # Ascending: from 22.4 to 0.35 below the largest logit.
    below = ((9 - j) * (9 - j)).to(COMPUTE) * 0.35
    pivot = _to_key(tl.zeros([_PIVOTS], COMPUTE) + largest - below, COMPUTE)
    hi = _to_key(largest, COMPUTE) + 1
    beyond = tl.zeros_like(count)  # ids at or above hi: with one id left between, the answer is found
    while (hi - 1 > lo) & (count > few) & (count > beyond + 1):
        pivot = tl.minimum(tl.maximum(pivot, lo + 1), hi - 1)
        counts, masses = _at_or_above(
            law, row, position, listed, _from_key(pivot, COMPUTE), largest, size, LISTED, ANTI, FEATURES, COMPUTE
        )
        enough = (counts >= least_count) & (masses >= least_mass)
        lo = tl.maximum(lo, tl.max(tl.where(enough, pivot, lo), 0))
        hi = tl.minimum(hi, tl.min(tl.where(enough, hi, pivot), 0))
        count = tl.minimum(count, tl.min(tl.where(enough, counts, count), 0))
        beyond = tl.maximum(beyond, tl.max(tl.where(enough, beyond, counts), 0))
        mass = tl.minimum(mass, tl.min(tl.where(enough, masses, mass), 0))
        # Dividing first, since the width of a float64 bracket need not fit in 64 bits.
        pivot = lo + j * tl.maximum(hi // 9 - lo // 9, 1)
    return lo, count, mass


@triton.jit
def _threshold(
    law,
    row,
    position,
    listed,
    largest,
    lo,
    count,
    mass,
    total,
    top_k,
    top_p,
    by_count,
    by_mass,
    size,
    LISTED: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Key of tau for top-k and then top-p, of logits of which those below lo are known not to be kept.

    `total` is the mass of the whole row: top-p alone takes its share of that, and of the top-k set otherwise.
    """
    if by_count:
        lo, count, total = _narrow(
            law, row, position, listed, largest, lo, count, mass, top_k, 0.0, top_k, size,
            LISTED, ANTI, FEATURES, COMPUTE,
        )  # fmt: skip
        mass = total
    if by_mass:
        lo, count, mass = _narrow(
            law, row, position, listed, largest, lo, count, mass, 0, top_p * total, 0, size,
            LISTED, ANTI, FEATURES, COMPUTE,
        )  # fmt: skip
    return lo


@triton.jit
def filter_row(
    law,
    keys,
    candidates,
    row,
    position,
    line,
    largest,
    log_total,
    vocab_size,
    PURPOSE: tl.constexpr,
    RACE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """tau, log-sum-exp of the kept logits, and the race among them.

    Args:
        law, keys: of the launch.
        candidates: lists; this row's is line `line`.
        row, position: of the law.
        largest, log_total: the largest of all its logits, and their log-sum-exp.
        others: as in `scan_split`; RACE is 0 or 2.

    Returns:
        tau and log-sum-exp in COMPUTE, and the winner's id (0 without a race).
    """
    greedy = is_greedy(law, row)
    tau = tl.zeros_like(largest) - INFINITY
    lse = log_total
    winner = tl.zeros_like(line)
    top_k = winner + vocab_size
    top_p = tl.zeros_like(largest) + 1.0
    least_p = tau
    usable = (log_total < INFINITY) & (log_total > -INFINITY) & (greedy == 0)
    if usable:
        if TOP_K & FILTERS:
            asked = tl.load(law.warp.top_k + row).to(tl.int32)
            top_k = tl.where((asked <= 0) | (asked > vocab_size), vocab_size, asked)
        if TOP_P & FILTERS:
            top_p = tl.load(law.warp.top_p + row).to(COMPUTE)
        if MIN_P & FILTERS:
            least_p = largest + tl.log(tl.load(law.warp.min_p + row).to(COMPUTE))
    by_count = top_k < vocab_size
    by_mass = top_p < 1.0
    total = tl.exp(log_total - largest)
    lo = _to_key(tau, COMPUTE)
    count = tl.zeros_like(top_k) + vocab_size
    mass = total
    if by_count | by_mass:
        # The nucleus of the top-k set lies within that set, so a bound on the set is enough for the list.
        least_count = tl.where(by_count, top_k, 0)
        lo, count, mass = _narrow(
            law, row, position, largest, largest, lo, count, mass, least_count,
            tl.where(by_count, 0.0, top_p * total), tl.maximum(least_count, CANDIDATES), vocab_size,
            False, ANTI, FEATURES, COMPUTE,
        )  # fmt: skip
    if (by_count | by_mass) & (count <= CANDIDATES):
        tau = _from_key(lo, COMPUTE)
        list_z = candidates.z + line.to(tl.int64) * CANDIDATES
        list_id = candidates.id + line.to(tl.int64) * CANDIDATES
        stored = tl.zeros_like(top_k)
        for first in range(0, vocab_size, _BLOCK):
            ids = first + tl.arange(0, _BLOCK)
            z, _ = scaled_logits(law, row, position, ids, ids < vocab_size, ANTI, FEATURES, COMPUTE)
            chosen = (z >= tau) & (ids < vocab_size)
            found = tl.sum(chosen.to(tl.int32), 0)
            if found > 0:
                at = stored + tl.cumsum(chosen.to(tl.int32), 0) - 1
                tl.store(list_z + at, z, mask=chosen)
                tl.store(list_id + at, ids, mask=chosen)
                stored += found
        tl.debug_barrier()
        slot = tl.arange(0, CANDIDATES)
        z = tl.load(list_z + slot, mask=slot < stored, other=-INFINITY)
        lo = _threshold(
            law, row, position, z, largest, lo, stored, mass, total, top_k, top_p, by_count, by_mass, stored,
            True, ANTI, FEATURES, COMPUTE,
        )  # fmt: skip
        tau = tl.maximum(_from_key(lo, COMPUTE), least_p)
        kept_z = tl.where(z >= tau, z, -INFINITY)
        lse = largest + tl.log(tl.sum(tl.exp(kept_z - largest), 0))
        if RACE == 2:
            ids = tl.load(list_id + slot, mask=slot < stored, other=0)
            word = words_at(keys, row, position, PURPOSE, ids, BLOCKS)
            _, winner = first_largest(race_key(kept_z, word, greedy), ids)
    else:
        if by_count | by_mass:
            lo = _threshold(
                law, row, position, largest, largest, lo, count, mass, total, top_k, top_p, by_count, by_mass,
                vocab_size, False, ANTI, FEATURES, COMPUTE,
            )  # fmt: skip
            tau = _from_key(lo, COMPUTE)
        tau = tl.maximum(tau, least_p)
        if (tau > -INFINITY) | (RACE == 2):
            sums = tl.zeros([_BLOCK], COMPUTE)
            best = tl.zeros_like(largest).to(tl.float64) - INFINITY
            for first in range(0, vocab_size, _BLOCK):
                ids = first + tl.arange(0, _BLOCK)
                z, _ = scaled_logits(law, row, position, ids, ids < vocab_size, ANTI, FEATURES, COMPUTE)
                kept = z >= tau
                if tl.max(kept.to(tl.int32), 0) > 0:
                    sums += tl.where(kept, tl.exp(z - largest), 0.0)
                    if RACE == 2:
                        word = words_at(keys, row, position, PURPOSE, ids, BLOCKS)
                        key, found = first_largest(race_key(tl.where(kept, z, -INFINITY), word, greedy), ids)
                        winner = tl.where(key > best, found, winner)
                        best = tl.maximum(best, key)
            if usable:
                lse = largest + tl.log(tl.sum(sums, 0))
    return tau, lse, winner
