"""Draft sampling: from a drafter's logits to one token a row, and the descriptor of the law it was drawn from.

One launch. Without filters every split of a row is a program of its own, and the last one to finish combines them; with
filters a row is one program, which scans, filters and races in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused import arguments
from specproxy_kernels.fused.filters import filter_row
from specproxy_kernels.fused.laws import INFINITY, SAMPLING, scaled_logits
from specproxy_kernels.fused.rows import SPLIT, arrive, combine_race, combine_splits, scan_split
from specproxy_kernels.laws import WarpParameters
from specproxy_kernels.noise import PURPOSE_TOKEN
from specproxy_kernels.reference import DraftLaw, NoiseStream

__all__ = ["sample_drafts"]

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
