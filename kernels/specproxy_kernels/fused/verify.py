"""Verification of a window: logit arithmetic, acceptance, and the next token, in one to four launches.

    score     grid (splits, B * W)   statistics of the target's rows; under `coupled` and in greedy rows the race too
    filter    grid (B * W)           with filters alone: tau and log-sum-exp of each row (and the race under `coupled`)
    weigh     grid (splits, B * G)   `block` alone: the masses R_i of the weighted residuals
    emit      grid (splits, B)       not under `coupled`: the residual's or the target's race at the first refused row

The last program to finish a row combines its splits and scores its draft; the last one to finish a sequence decides
how many drafts survive. So `coupled` and greedy batches take one launch, `rejection` two and `block` three, and one
more where some row filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused import arguments
from specproxy_kernels.fused.filters import filter_row
from specproxy_kernels.fused.laws import INFINITY, NO_ID, SAMPLING, first_largest, is_greedy, scaled_logits
from specproxy_kernels.fused.noise import RUN, coins, lane_word, log1p, tile_ids, token_words
from specproxy_kernels.fused.rows import COUNTERS, SPLIT, arrive, combine_race, combine_splits, race_key, scan_split
from specproxy_kernels.laws import LogitPair, WarpParameters
from specproxy_kernels.noise import PURPOSE_COIN, PURPOSE_RESIDUAL, PURPOSE_TOKEN
from specproxy_kernels.reference import (
    RULES,
    STATUS_EMPTY_RESIDUAL,
    STATUS_EMPTY_SUPPORT,
    STATUS_NON_FINITE,
    DraftLaw,
    NoiseStream,
)

__all__ = ["verify_window"]

_TOKEN = tl.constexpr(PURPOSE_TOKEN)
_COIN = tl.constexpr(PURPOSE_COIN)
_RESIDUAL = tl.constexpr(PURPOSE_RESIDUAL)
_NON_FINITE = tl.constexpr(STATUS_NON_FINITE)
_EMPTY_SUPPORT = tl.constexpr(STATUS_EMPTY_SUPPORT)
_EMPTY_RESIDUAL = tl.constexpr(STATUS_EMPTY_RESIDUAL)

# Values of RULE.
REJECTION = tl.constexpr(0)
BLOCK = tl.constexpr(1)
COUPLED = tl.constexpr(2)


class Rows(NamedTuple):
    """What is known of each of B * W rows of the window, [B, W]; `log_ratio` is log p - log q of its draft."""

    tau: Tensor
    lse: Tensor
    log_ratio: Tensor
    token: Tensor
    status: Tensor


class DraftRows(NamedTuple):
    """The draft law: the drafter's logits as a `Law`, and the descriptors [B, G] kept at the draw."""

    law: tuple[object, ...]
    tau: Tensor
    lse: Tensor
    row_stride: int
    num_drafts: Tensor


class Outcome(NamedTuple):
    """Of every sequence, [B]: `usable` drafts stand before the first row whose law cannot be used."""

    num_accepted: Tensor
    next_token: Tensor
    status: Tensor
    log_weight: Tensor
    usable: Tensor


@triton.jit
def _log_prob(z, tau, lse, FILTERS: tl.constexpr):
    log_prob = z - lse
    if FILTERS != 0:
        log_prob = tl.where(z >= tau, log_prob, -INFINITY)
    return log_prob


@triton.jit
def _log_draft(
    drafted,
    row,
    position,
    ids,
    inside,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    CERTAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """log q at ids of a drafted position, in COMPUTE."""
    if CERTAIN:
        prefix = drafted.law.prefix
        draft = tl.load(prefix.drafts + row * prefix.length + position)
        log_draft = tl.where(ids == draft, 0.0, -INFINITY).to(COMPUTE)
    else:
        z, _ = scaled_logits(drafted.law, row, position, ids, inside, 0, FEATURES, DRAFT_COMPUTE)
        lse = tl.load(drafted.lse + row * drafted.row_stride + position).to(DRAFT_COMPUTE)
        tau = lse
        if FILTERS != 0:
            tau = tl.load(drafted.tau + row * drafted.row_stride + position).to(DRAFT_COMPUTE)
        log_draft = _log_prob(z, tau, lse, FILTERS).to(COMPUTE)
    return log_draft


@triton.jit
def _finish_row(
    law,
    drafted,
    rows,
    row,
    position,
    line,
    tau,
    lse,
    bad,
    winner,
    vocab_size,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    CERTAIN: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """Store a row's descriptor, its status, and how its draft compares with the law it was drawn from."""
    # The warp itself can overflow (a tiny temperature or penalty), which the sum of its exponentials shows.
    usable = (bad == 0) & (lse < INFINITY)
    status = tl.where(usable, tl.where(lse == -INFINITY, _EMPTY_SUPPORT, 0), _NON_FINITE)
    tl.store(rows.tau + line, tau)
    tl.store(rows.lse + line, lse)
    tl.store(rows.status + line, status)
    tl.store(rows.token + line, winner)
    if position < tl.load(drafted.num_drafts + row):
        prefix = law.prefix
        draft = tl.load(prefix.drafts + row * prefix.length + position).to(tl.int32)
        inside = draft < vocab_size
        z, _ = scaled_logits(law, row, position, draft, inside, ANTI, FEATURES, COMPUTE)
        log_target = _log_prob(z, tau, lse, FILTERS)
        log_draft = _log_draft(
            drafted, row, position, draft, inside, FEATURES, FILTERS, CERTAIN, COMPUTE, DRAFT_COMPUTE
        )
        tl.store(rows.log_ratio + line, log_target - log_draft)


@triton.jit
def _decide(
    law,
    keys,
    drafted,
    rows,
    outcome,
    row,
    window,
    RULE: tl.constexpr,
    BLOCKS: tl.constexpr,
    FEATURES: tl.constexpr,
    GREEDY: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    """How many drafts of a sequence survive; under `block` its sampling rows are decided later, by `_weigh`."""
    i = tl.arange(0, DRAFTS)
    num_drafts = tl.load(drafted.num_drafts + row).to(tl.int32)
    live = i < num_drafts
    status = tl.load(rows.status + row * window + i, mask=live, other=0, cache_modifier=".cg")
    usable = tl.min(tl.where(live & (status != 0), i, num_drafts), 0)
    greedy = is_greedy(law, row)
    survives = live
    if RULE == COUPLED or GREEDY:
        prefix = law.prefix
        draft = tl.load(prefix.drafts + row * prefix.length + i, mask=live, other=-1)
        token = tl.load(rows.token + row * window + i, mask=live, other=-2, cache_modifier=".cg")
        survives = token == draft
    if RULE != COUPLED and SAMPLING & FEATURES:
        log_ratio = tl.load(rows.log_ratio + row * window + i, mask=live, other=0, cache_modifier=".cg")
        coin = coins(keys, row, DRAFTS, _COIN, BLOCKS)
        # A ratio that is NaN must not survive, and `minimum` would drop the NaN.
        by_coin = (coin < tl.exp(tl.minimum(log_ratio, 0.0))) & (log_ratio == log_ratio)
        survives = tl.where(greedy, survives, by_coin) if GREEDY else by_coin
    num_accepted = tl.min(tl.where((i < usable) & (survives == 0), i, usable), 0)
    tl.store(outcome.usable + row, usable)
    tl.store(outcome.num_accepted + row, num_accepted.to(tl.int64))
    tl.store(outcome.log_weight + row, 0.0)
    line = row * window + num_accepted
    tl.store(outcome.next_token + row, tl.load(rows.token + line, cache_modifier=".cg").to(tl.int64))
    tl.store(outcome.status + row, tl.load(rows.status + line, cache_modifier=".cg"))


@triton.jit
def score_kernel(
    law,
    keys,
    drafted,
    partials,
    rows,
    outcome,
    row_counter,
    sequence_counter,
    window,
    vocab_size,
    splits,
    RULE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    GREEDY: tl.constexpr,
    CERTAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    DRAFTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """Statistics of every row that has a draft before it, and without filters the decision; grid (splits, B * W)."""
    split = tl.program_id(0)
    line = tl.program_id(1)
    row = line // window
    position = line % window
    needed = tl.load(drafted.num_drafts + row).to(tl.int32) + 1
    # Filtered rows race among what is kept, which is not known yet.
    SAMPLED_RACE: tl.constexpr = 2 if RULE == COUPLED and SAMPLING & FEATURES and FILTERS == 0 else 0
    RACE: tl.constexpr = SAMPLED_RACE if SAMPLED_RACE else (1 if GREEDY else 0)
    if position < needed:
        scan_split(
            law, keys, partials, row, position, line, split, splits, vocab_size,
            _TOKEN, RACE, BLOCKS, ANTI, FEATURES, COMPUTE,
        )  # fmt: skip
        if FILTERS == 0:  # noqa: SIM102 - a constant, which decides whether what follows is compiled
            if arrive(row_counter + line, splits):
                largest, log_total, bad = combine_splits(partials, line, splits, SPLITS, COMPUTE)
                winner = tl.zeros_like(split)
                if RACE != 0:
                    _best, winner = combine_race(partials.key, partials.id, line, splits, SPLITS)
                _finish_row(
                    law, drafted, rows, row, position, line, largest, log_total, bad, winner, vocab_size,
                    ANTI, FEATURES, FILTERS, CERTAIN, COMPUTE, DRAFT_COMPUTE,
                )  # fmt: skip
                if arrive(sequence_counter + row, needed):
                    _decide(law, keys, drafted, rows, outcome, row, window, RULE, BLOCKS, FEATURES, GREEDY, DRAFTS)


@triton.jit
def filter_kernel(
    law,
    keys,
    drafted,
    partials,
    candidates,
    rows,
    outcome,
    sequence_counter,
    window,
    vocab_size,
    splits,
    RULE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    GREEDY: tl.constexpr,
    CERTAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    DRAFTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """The filters of every row that has a draft before it, and the decision; grid (B * W)."""
    line = tl.program_id(0)
    row = line // window
    position = line % window
    needed = tl.load(drafted.num_drafts + row).to(tl.int32) + 1
    RACE: tl.constexpr = 2 if RULE == COUPLED else 0
    if position < needed:
        largest, log_total, bad = combine_splits(partials, line, splits, SPLITS, COMPUTE)
        tau, lse, winner = filter_row(
            law, keys, candidates, row, position, line, largest, log_total, vocab_size,
            _TOKEN, RACE, BLOCKS, ANTI, FEATURES, FILTERS, COMPUTE,
        )  # fmt: skip
        if RULE != COUPLED and GREEDY:
            _best, winner = combine_race(partials.key, partials.id, line, splits, SPLITS)
        _finish_row(
            law, drafted, rows, row, position, line, tau, lse, bad, winner, vocab_size,
            ANTI, FEATURES, FILTERS, CERTAIN, COMPUTE, DRAFT_COMPUTE,
        )  # fmt: skip
        if arrive(sequence_counter + row, needed):
            _decide(law, keys, drafted, rows, outcome, row, window, RULE, BLOCKS, FEATURES, GREEDY, DRAFTS)


@triton.jit
def _residual_log_weight(log_target, log_draft):
    """log (exp(target) - exp(draft))+, as `residual_log_weights`."""
    positive = log_draft < log_target
    difference = tl.where(positive, log_draft - log_target, -INFINITY)
    return tl.where(positive, log_target + log1p(-tl.exp(difference)), -INFINITY)


@triton.jit
def _log_block_weights(rows, row, window, usable, DRAFTS: tl.constexpr):
    """log P_i after i drafts, for i = 1 .. DRAFTS in column i - 1: P_i = min(1, P_{i-1} p(x_i) / q(x_i))."""
    i = tl.arange(0, DRAFTS)
    log_ratio = tl.load(rows.log_ratio + row * window + i, mask=i < usable, other=0, cache_modifier=".cg")
    weights = tl.zeros_like(log_ratio)
    weight = tl.sum(weights, 0)
    for j in range(usable):
        weight += tl.sum(tl.where(i == j, log_ratio, 0.0), 0)
        # Not `minimum`, which would drop a NaN.
        weight = tl.where(weight > 0, 0.0, weight)
        weights = tl.where(i == j, weight, weights)
    return weights


@triton.jit
def weigh_kernel(
    law,
    keys,
    drafted,
    rows,
    outcome,
    masses,
    counter,
    window,
    vocab_size,
    splits,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    CERTAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    DRAFTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """Block verification of the sampling rows; grid (splits, B * G).

    R_i = sum over v of (P_i p(v) - q(v))+ at window position i, of which positions 1 .. G - 1 are needed; the last
    program of a sequence takes the largest i whose coin lies below h_i.
    """
    split = tl.program_id(0)
    line = tl.program_id(1)
    row = line // (window - 1)
    position = line % (window - 1)
    usable = tl.load(outcome.usable + row)
    if (position < usable) & (is_greedy(law, row) == 0):
        log_weights = _log_block_weights(rows, row, window, usable, DRAFTS)
        i = tl.arange(0, DRAFTS)
        if position > 0:
            log_weight = tl.sum(tl.where(i == position - 1, log_weights, 0.0), 0)
            tau = tl.load(rows.tau + row * window + position)
            lse = tl.load(rows.lse + row * window + position)
            mass = tl.zeros([COUNTERS], COMPUTE)
            UNROLL: tl.constexpr = 4 if (SAMPLING | FEATURES) == SAMPLING else 1
            for lane in tl.range(4, loop_unroll_factor=UNROLL):
                ids = split * SPLIT + lane * COUNTERS + tl.arange(0, COUNTERS)
                inside = ids < vocab_size
                z, _ = scaled_logits(law, row, position, ids, inside, ANTI, FEATURES, COMPUTE)
                log_target = _log_prob(z, tau, lse, FILTERS) + log_weight
                log_draft = _log_draft(
                    drafted, row, position, ids, inside, FEATURES, FILTERS, CERTAIN, COMPUTE, DRAFT_COMPUTE
                )
                mass += tl.exp(_residual_log_weight(log_target, log_draft))
            tl.store(masses + line * splits + split, tl.sum(mass, 0))
        if arrive(counter + row, usable * splits):
            inner_mass = tl.zeros([DRAFTS], COMPUTE)
            all_splits = tl.arange(0, SPLITS)
            first_line = row * (window - 1)
            for j in range(1, usable):
                part = tl.load(
                    masses + (first_line + j) * splits + all_splits,
                    mask=all_splits < splits,
                    other=0,
                    cache_modifier=".cg",
                )
                inner_mass = tl.where(i == j - 1, tl.sum(part, 0), inner_mass)
            weights = tl.exp(log_weights)
            denominator = inner_mass + 1 - weights
            inner = tl.where(denominator > 0, inner_mass / tl.where(denominator > 0, denominator, 1.0), 1.0)
            keep = tl.where(i == usable - 1, weights, inner)
            kept = (coins(keys, row, DRAFTS, _COIN, BLOCKS) < keep) & (i < usable)
            num_accepted = tl.max(tl.where(kept, i + 1, 0), 0)
            tl.store(outcome.num_accepted + row, num_accepted.to(tl.int64))
            tl.store(outcome.log_weight + row, tl.sum(tl.where(i == num_accepted - 1, log_weights, 0.0), 0))
            tl.store(outcome.status + row, tl.load(rows.status + row * window + num_accepted))


@triton.jit
def emit_kernel(
    law,
    keys,
    drafted,
    rows,
    outcome,
    target_key,
    target_id,
    residual_key,
    residual_id,
    counter,
    window,
    vocab_size,
    splits,
    BLOCKS: tl.constexpr,
    ANTI: tl.constexpr,
    FEATURES: tl.constexpr,
    FILTERS: tl.constexpr,
    CERTAIN: tl.constexpr,
    SPLITS: tl.constexpr,
    DRAFTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAFT_COMPUTE: tl.constexpr,
):
    """The next token of every sampling row, at its position `num_accepted`; grid (splits, B)."""
    split = tl.program_id(0)
    row = tl.program_id(1)
    if is_greedy(law, row) == 0:
        position = tl.load(outcome.num_accepted + row).to(tl.int32)
        refused = position < tl.load(drafted.num_drafts + row).to(tl.int32)
        log_weight = tl.load(outcome.log_weight + row)
        tau = tl.load(rows.tau + row * window + position)
        lse = tl.load(rows.lse + row * window + position)
        UNROLL: tl.constexpr = 4 if (SAMPLING | FEATURES) == SAMPLING else 1
        first = split * SPLIT
        lane_0 = tile_ids(first, COUNTERS)
        w0, w1, w2, w3 = token_words(keys, row, position, _RESIDUAL, first, COUNTERS, BLOCKS)
        best = tl.full([COUNTERS], -INFINITY, tl.float64)
        best_id = tl.full([COUNTERS], NO_ID, tl.int32)
        best_residual = best
        best_residual_id = best_id
        for lane in tl.range(4, loop_unroll_factor=UNROLL):
            ids = lane_0 + lane * RUN
            inside = ids < vocab_size
            word = lane_word(lane, w0, w1, w2, w3)
            z, _bad = scaled_logits(law, row, position, ids, inside, ANTI, FEATURES, COMPUTE)
            kept = z
            if FILTERS != 0:
                kept = tl.where(z >= tau, z, -INFINITY)
            key = race_key(kept, word, False)
            better = key > best
            best_id = tl.where(better, ids, best_id)
            best = tl.where(better, key, best)
            if refused:
                log_target = kept - lse + log_weight
                log_draft = _log_draft(
                    drafted, row, position, ids, inside, FEATURES, FILTERS, CERTAIN, COMPUTE, DRAFT_COMPUTE
                )
                residual = race_key(_residual_log_weight(log_target, log_draft), word, False)
                better = residual > best_residual
                best_residual_id = tl.where(better, ids, best_residual_id)
                best_residual = tl.where(better, residual, best_residual)
        at = row * splits + split
        split_best, split_id = first_largest(best, best_id)
        tl.store(target_key + at, split_best)
        tl.store(target_id + at, split_id)
        split_best, split_id = first_largest(best_residual, best_residual_id)
        tl.store(residual_key + at, split_best)
        tl.store(residual_id + at, split_id)
        if arrive(counter + row, splits):
            _target_best, token = combine_race(target_key, target_id, row, splits, SPLITS)
            residual_best, residual_token = combine_race(residual_key, residual_id, row, splits, SPLITS)
            has_residual = residual_best > -INFINITY
            tl.store(outcome.next_token + row, tl.where(refused & has_residual, residual_token, token).to(tl.int64))
            if refused & (has_residual == 0):
                # Rounding left no residual mass: drawn from the target, and counted.
                tl.store(outcome.status + row, tl.load(outcome.status + row) | _EMPTY_RESIDUAL)


def verify_window(
    rule: str,
    base: Tensor,
    pairs: Sequence[LogitPair],
    drafts: Tensor,
    num_drafts: Tensor,
    draft_law: DraftLaw | None,
    parameters: WarpParameters,
    noise: NoiseStream,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`specproxy_kernels.reference.verify_window` in at most four launches; arguments and results are described there.

    Raises:
        ValueError: a tensor whose shape, dtype or stride the kernels do not read.
    """
    batch, count = drafts.shape
    window = count + 1
    device = base.device
    target = arguments.prepare(base, pairs, parameters, drafts, vocab_size)
    compute = arguments.torch_dtype(target.compute)
    keys, blocks = arguments.noise_keys(noise)
    certain = draft_law is None
    drafted = target
    tau = lse = noise.key
    if draft_law is not None:
        drafted = arguments.prepare(draft_law.logits, [], parameters, drafts, vocab_size, name="draft_law.logits")
        lse = draft_law.lse.contiguous()
        tau = lse if draft_law.tau is None else draft_law.tau.contiguous()
    draft_rows = DraftRows(drafted.law, tau, lse, count, num_drafts.contiguous())
    splits = triton.cdiv(vocab_size, SPLIT.value)
    floats = torch.empty(3, batch, window, dtype=compute, device=device)
    integers = torch.empty(2, batch, window, dtype=torch.int32, device=device)
    rows = Rows(floats[0], floats[1], floats[2], integers[0], integers[1])
    outcome = Outcome(
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=compute, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
    )
    counters = arguments.counters(batch * window + batch, device)
    sequence_counters = counters[batch * window :]
    sampled = parameters.any_sampling
    races = rule == "coupled" or parameters.any_greedy
    # An unread draft law costs the compiler nothing, but keeps the number of variants down.
    shared = {
        "BLOCKS": blocks,
        "ANTI": target.anti,
        "FEATURES": target.features,
        "FILTERS": target.filters,
        "CERTAIN": certain,
        "SPLITS": triton.next_power_of_2(splits),
        "DRAFTS": triton.next_power_of_2(max(count, 1)),
        "COMPUTE": target.compute,
        "DRAFT_COMPUTE": drafted.compute,
    }
    options = arguments.launch_options(target)
    decision = {"RULE": RULES.index(rule), "GREEDY": parameters.any_greedy, **shared}
    with arguments.on(device):
        partials = arguments.partials(batch * window, splits, compute, device, races)
        score_kernel[(splits, batch * window)](
            target.law, keys, draft_rows, partials, rows, outcome, counters, sequence_counters, window, vocab_size,
            splits, **options, **decision,
        )  # fmt: skip
        if target.filters:
            candidates = arguments.candidates(batch * window, compute, device)
            filter_kernel[(batch * window,)](
                target.law, keys, draft_rows, partials, candidates, rows, outcome, sequence_counters, window,
                vocab_size, splits, **arguments.launch_options(target, filtering=True), **decision,
            )  # fmt: skip
        if sampled and rule == "block" and count > 0:
            masses = torch.empty(batch * count, splits, dtype=compute, device=device)
            weigh_kernel[(splits, batch * count)](
                target.law, keys, draft_rows, rows, outcome, masses, sequence_counters, window, vocab_size, splits,
                **options, **shared,
            )  # fmt: skip
        if sampled and rule != "coupled":
            races_of = arguments.race_results(batch, splits, device), arguments.race_results(batch, splits, device)
            emit_kernel[(splits, batch)](
                target.law, keys, draft_rows, rows, outcome, *races_of[0], *races_of[1], sequence_counters, window,
                vocab_size, splits, **options, **shared,
            )  # fmt: skip
    return outcome.num_accepted, outcome.next_token, outcome.status
