"""Draft sampling: from a drafter's logits to one token a row, and the descriptor of the law it was drawn from; or to
the best candidates of every node of a token tree.

A draft takes one launch. Without filters every split of a row is a program of its own, and the last one to finish
combines them; with filters a row is one program, which scans, filters and races in turn. Candidates take one launch
that writes what every token is raced by (behind one for the filters, where there are any), and torch's own top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused import arguments
from specproxy_kernels.fused.filters import filter_row
from specproxy_kernels.fused.laws import INFINITY, SAMPLING, is_greedy, scaled_logits
from specproxy_kernels.fused.noise import RUN, lane_word, tile_ids, token_words
from specproxy_kernels.fused.rows import COUNTERS, SPLIT, arrive, combine_race, combine_splits, race_key, scan_split
from specproxy_kernels.laws import WarpParameters, repeat_rows
from specproxy_kernels.noise import PURPOSE_TOKEN
from specproxy_kernels.reference import DraftLaw, NoiseStream

__all__ = ["sample_candidates", "sample_drafts"]

_TOKEN = tl.constexpr(PURPOSE_TOKEN)
_BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["position"])
def draft_kernel(
    law,
    keys,
    partials,
    counter,
    token_pointer,
    lse_pointer,
    position,
    vocab_size,
    splits,
    BLOCKS: tl.constexpr,
    FEATURES: tl.constexpr,
    SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows without filters; grid (splits, B)."""
    split = tl.program_id(0)
    row = tl.program_id(1)
    RACE: tl.constexpr = 2 if SAMPLING & FEATURES else 1
    scan_split(
        law, keys, partials, row, position, row, split, splits, vocab_size, _TOKEN, RACE, BLOCKS, 0, FEATURES, COMPUTE
    )
    if arrive(counter + row, splits):
        largest, log_total, _bad = combine_splits(partials, row, splits, SPLITS, COMPUTE)
        _best, winner = combine_race(partials.key, partials.id, row, splits, SPLITS)
        tl.store(token_pointer + row, winner.to(tl.int64))
        # The descriptor of a greedy batch is the largest logit, as in the reference: nothing samples from it.
        tl.store(lse_pointer + row, log_total if SAMPLING & FEATURES else largest)


@triton.jit(do_not_specialize=["position"])
def filtered_draft_kernel(
    law,
    keys,
    candidates,
    token_pointer,
    tau_pointer,
    lse_pointer,
    position,
    vocab_size,
    BLOCKS: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows with filters; grid (B)."""
    row = tl.program_id(0)
    largest = tl.full([_BLOCK], -INFINITY, COMPUTE)
    total = tl.zeros([_BLOCK], COMPUTE)
    for first in range(0, vocab_size, _BLOCK):
        ids = first + tl.arange(0, _BLOCK)
        z, _ = scaled_logits(law, row, position, ids, ids < vocab_size, 0, FEATURES, COMPUTE)
        higher = tl.maximum(largest, z)
        finite = tl.where(higher == -INFINITY, 0.0, higher)
        total = total * tl.exp(largest - finite) + tl.exp(z - finite)
        largest = higher
    row_largest = tl.max(largest, 0)
    finite_largest = tl.where(row_largest == -INFINITY, 0.0, row_largest)
    log_total = finite_largest + tl.log(tl.sum(total * tl.exp(largest - finite_largest), 0))
    tau, lse, winner = filter_row(
        law, keys, candidates, row, position, row, row_largest, log_total, vocab_size,
        _TOKEN, 2, BLOCKS, 0, FEATURES, FILTERS, COMPUTE,
    )  # fmt: skip
    tl.store(token_pointer + row, winner.to(tl.int64))
    tl.store(tau_pointer + row, tau)
    tl.store(lse_pointer + row, lse)


@triton.jit(do_not_specialize=["position"])
def race_kernel(
    law,
    keys,
    tau_pointer,
    race_pointer,
    position,
    vocab_size,
    BLOCKS: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What every token of a row is raced by, float64 [rows, V]; grid (splits, rows)."""
    first = tl.program_id(0) * SPLIT
    row = tl.program_id(1)
    UNROLL: tl.constexpr = 4 if (SAMPLING | FEATURES) == SAMPLING else 1
    lane_0 = tile_ids(first, COUNTERS)
    greedy = is_greedy(law, row)
    if SAMPLING & FEATURES:
        w0, w1, w2, w3 = token_words(keys, row, position, _TOKEN, first, COUNTERS, BLOCKS)
    for lane in tl.range(4, loop_unroll_factor=UNROLL):
        ids = lane_0 + lane * RUN
        inside = ids < vocab_size
        z, _ = scaled_logits(law, row, position, ids, inside, 0, FEATURES, COMPUTE)
        if FILTERS != 0:
            z = tl.where(z >= tl.load(tau_pointer + row), z, -INFINITY)
        if SAMPLING & FEATURES:
            race = race_key(z, lane_word(lane, w0, w1, w2, w3), greedy)
        else:
            race = z.to(tl.float64)
        tl.store(race_pointer + row.to(tl.int64) * vocab_size + ids, race, mask=inside)


def sample_drafts(
    logits: Tensor, parameters: WarpParameters, drafts: Tensor, noise: NoiseStream, vocab_size: int
) -> tuple[Tensor, DraftLaw]:
    """`specproxy_kernels.reference.sample_drafts` in one launch; arguments and results are described there."""
    batch = logits.shape[0]
    position = drafts.shape[1]
    compute = torch.promote_types(logits.dtype, torch.float32)
    prepared = arguments.prepare(logits, [], parameters, drafts, vocab_size, one_position=True)
    keys, blocks = arguments.noise_keys(noise)
    device = logits.device
    token = torch.empty(batch, 1, dtype=torch.int64, device=device)
    lse = torch.empty(batch, 1, dtype=compute, device=device)
    tau = None
    with arguments.on(device):
        if prepared.filters:
            tau = torch.empty_like(lse)
            filtered_draft_kernel[(batch,)](
                prepared.law, keys, arguments.candidates(batch, compute, device), token, tau, lse, position, vocab_size,
                BLOCKS=blocks, FEATURES=prepared.features, FILTERS=prepared.filters, COMPUTE=prepared.compute,
                **arguments.launch_options(prepared, filtering=True),
            )  # fmt: skip
        else:
            splits = triton.cdiv(vocab_size, SPLIT.value)
            partials = arguments.partials(batch, splits, compute, device, race=True)
            counters = arguments.counters(batch, device)
            draft_kernel[(splits, batch)](
                prepared.law, keys, partials, counters, token, lse, position, vocab_size, splits,
                BLOCKS=blocks, FEATURES=prepared.features, SPLITS=triton.next_power_of_2(splits),
                COMPUTE=prepared.compute, **arguments.launch_options(prepared),
            )  # fmt: skip
    return token, DraftLaw(logits, tau, lse)


def sample_candidates(
    logits: Tensor, parameters: WarpParameters, drafts: Tensor, noise: NoiseStream, vocab_size: int, count: int
) -> Tensor:
    """`specproxy_kernels.reference.sample_candidates`, whose arguments and results are described there."""
    batch, nodes, position = drafts.shape
    rows = batch * nodes
    device = logits.device
    # Every node is a row of its own, with the draws of its sequence.
    flat = logits.reshape(rows, 1, -1)

    def spread(value: Tensor) -> Tensor:
        return value[:, None].expand(-1, nodes).flatten()

    block_start = None if noise.block_start is None else spread(noise.block_start)
    own = NoiseStream(spread(noise.key), spread(noise.start), block_start)
    repeated = repeat_rows(parameters, nodes)
    prepared = arguments.prepare(flat, [], repeated, drafts.reshape(rows, -1), vocab_size, one_position=True)
    keys, blocks = arguments.noise_keys(own)
    tau = own.key  # not read without filters
    if prepared.filters:
        _, law = sample_drafts(flat, repeated, drafts.reshape(rows, -1), own, vocab_size)
        assert law.tau is not None
        tau = law.tau
    race = torch.empty(rows, vocab_size, dtype=torch.float64, device=device)
    with arguments.on(device):
        race_kernel[(triton.cdiv(vocab_size, SPLIT.value), rows)](
            prepared.law, keys, tau, race, position, vocab_size,
            BLOCKS=blocks, FEATURES=prepared.features, FILTERS=prepared.filters, COMPUTE=prepared.compute,
            **arguments.launch_options(prepared),
        )  # fmt: skip
    return race.topk(count, dim=-1).indices.view(batch, nodes, count)
