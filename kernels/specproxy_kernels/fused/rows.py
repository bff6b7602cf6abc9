"""Device functions over one row of the vocabulary: a split's partial results, their combination, arrivals.

A row is cut into splits of SPLIT ids. Their number depends on the vocabulary's size alone and they are combined in
fixed order, without float atomics: a row's result is bit-identical in any batch.

    largest    the largest z
    total      sum of exp(z - largest)
    bad        whether some combined logit is NaN or +inf
    key, id    the race: the largest z + Gumbel noise (z alone in a greedy row) and the smallest id that has it

The sum z + noise is taken in float64, where it is exact, so that a small temperature costs no digit of the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused.laws import INFINITY, NO_ID, SAMPLING, first_largest, is_greedy, scaled_logits
from specproxy_kernels.fused.noise import RUN, gumbel_of, lane_word, tile_ids, token_words

__all__ = ["COUNTERS", "SPLIT", "Partials", "arrive", "combine_race", "combine_splits", "race_key", "scan_split"]

COUNTERS = tl.constexpr(1024)  # noise counters of a split; four ids each
SPLIT = tl.constexpr(4096)


class Partials(NamedTuple):
    """Results of splits, [rows, splits] each; what a launch has no use for stands in unread."""

    largest: Tensor
    total: Tensor
    bad: Tensor
    key: Tensor
    id: Tensor


@triton.jit
def arrive(counter, expected):
    """Whether this program is the last of `expected` ones to arrive at `counter`, which it then sets back to 0.

    What every program stored before is visible to the last one: the barrier orders a program's own threads, the
    atomic orders the programs.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def race_key(z, word, greedy):
    """What a token is raced by, float64: z + noise, or z in a greedy row."""
    return z.to(tl.float64) + tl.where(greedy, 0.0, gumbel_of(word)).to(tl.float64)


@triton.jit
def scan_split(
    law,
    keys,
    partials,
    row,
    position,
    line,
    split,
    splits,
    vocab_size,
    PURPOSE: tl.constexpr,
    RACE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Partial results of one split of the law at (row, position), stored at line `line`.

    RACE: 0 none, 1 the largest z (greedy rows alone race), 2 z + noise of PURPOSE.
    """
    # Unrolled penalties would spill registers.
    UNROLL: tl.constexpr = 4 if (SAMPLING | FEATURES) == SAMPLING else 1
    first = split * SPLIT
    lane_0 = tile_ids(first, COUNTERS)
    greedy = is_greedy(law, row)
    largest = tl.full([COUNTERS], -INFINITY, COMPUTE)
    total = tl.zeros([COUNTERS], COMPUTE)
    any_bad = tl.zeros([COUNTERS], tl.int32)
    key = tl.full([COUNTERS], -INFINITY, tl.float64)
    winner = tl.full([COUNTERS], NO_ID, tl.int32)
    if RACE == 2:
        w0, w1, w2, w3 = token_words(keys, row, position, PURPOSE, first, COUNTERS, BLOCKS)
    for lane in tl.range(4, loop_unroll_factor=UNROLL):
        ids = lane_0 + lane * RUN
        z, bad = scaled_logits(law, row, position, ids, ids < vocab_size, ANTI, FEATURES, COMPUTE)
        any_bad = any_bad | bad.to(tl.int32)
        higher = tl.maximum(largest, z)
        finite = tl.where(higher == -INFINITY, 0.0, higher)
        total = total * tl.exp(largest - finite) + tl.exp(z - finite)
        largest = higher
        if RACE == 2:
            word = lane_word(lane, w0, w1, w2, w3)
            lane_key = race_key(z, word, greedy)
        else:
            lane_key = z.to(tl.float64)
        if RACE != 0:
            better = lane_key > key
            winner = tl.where(better, ids, winner)
            key = tl.where(better, lane_key, key)
    row_largest = tl.max(largest, 0)
    finite_largest = tl.where(row_largest == -INFINITY, 0.0, row_largest)
    at = line * splits + split
    tl.store(partials.largest + at, row_largest)
    tl.store(partials.total + at, tl.sum(total * tl.exp(largest - finite_largest), 0))
    tl.store(partials.bad + at, tl.max(any_bad, 0))
    if RACE != 0:
        best, best_id = first_largest(key, winner)
        tl.store(partials.key + at, best)
        tl.store(partials.id + at, best_id)


@triton.jit
def combine_splits(partials, line, splits, SPLITS: tl.constexpr, COMPUTE: tl.constexpr):
    """Largest z, log of the sum of exp(z), and whether anything is bad, of a whole row."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    at = line * splits + split
    largest = tl.load(partials.largest + at, mask=inside, other=-INFINITY, cache_modifier=".cg")
    total = tl.load(partials.total + at, mask=inside, other=0, cache_modifier=".cg")
    bad = tl.load(partials.bad + at, mask=inside, other=0, cache_modifier=".cg")
    row_largest = tl.max(largest, 0)
    finite = tl.where(row_largest == -INFINITY, 0.0, row_largest)
    # log(0) is -inf, the log-sum-exp of an empty support.
    log_total = finite + tl.log(tl.sum(total * tl.exp(largest - finite), 0))
    return row_largest, log_total, tl.max(bad, 0) != 0


@triton.jit
def combine_race(key_pointer, id_pointer, line, splits, SPLITS: tl.constexpr):
    """The winner of a row's race: its key and its id, which is a valid one even where every key is NaN."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    at = line * splits + split
    key = tl.load(key_pointer + at, mask=inside, other=-INFINITY, cache_modifier=".cg")
    ids = tl.load(id_pointer + at, mask=inside, other=NO_ID, cache_modifier=".cg")
    best, winner = first_largest(key, ids)
    return best, tl.where(winner == NO_ID, 0, winner)
