"""From tensors to the arguments of a launch: pointers with strides, feature bits, scratch memory. Host code only.

Nothing here reads a tensor's values. Scratch memory is allocated anew for every launch, so that a captured graph owns
what it writes; the arrival counters alone live on, since every launch leaves them at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused.filters import CANDIDATES, MIN_P, TOP_K, TOP_P, Candidates
from specproxy_kernels.fused.laws import ALLOWED, BIAS, COUNTS, REPETITION, SAMPLING, Law, LogitRows, Pair, Prefix, Warp
from specproxy_kernels.fused.noise import NoiseKeys
from specproxy_kernels.fused.rows import Partials
from specproxy_kernels.laws import LogitPair, WarpParameters
from specproxy_kernels.reference import NoiseStream

__all__ = ["Prepared", "candidates", "counters", "launch_options", "noise_keys", "on", "partials", "prepare"]

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_REGISTERS = 65_536  # of a multiprocessor, since compute capability 3.0
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Prepared(NamedTuple):
    """A law as launches take it.

    Args:
        law: pointers and strides.
        features: bits of what the warp has to do.
        filters: bits of the filters some row uses.
        anti: bit i is set where pair i has an anti-expert.
        compute: dtype of the arithmetic.
    """

    law: Law
    features: int
    filters: int
    anti: int
    compute: tl.dtype


def torch_dtype(compute: tl.dtype) -> torch.dtype:
    """The torch dtype of a `Prepared.compute`."""
    return next(dtype for dtype, ours in _DTYPES.items() if ours == compute)


def launch_options(prepared: Prepared, filtering: bool = False) -> dict[str, Any]:
    """Warps and compiler options of a launch.

    Args:
        prepared: the law.
        filtering: one program a row, rather than one a split.
    """
    heavy = prepared.compute == tl.float64 or (prepared.features | SAMPLING.value) != SAMPLING.value
    warps = 16 if filtering and not heavy else 8
    # Fused multiply-adds would round the logit arithmetic otherwise than the reference does.
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if filtering or heavy:
        # Left to itself, the assembler spills a few bytes rather than take the registers that a program could have.
        options["maxnreg"] = min(255, _REGISTERS // (32 * warps))
    return options


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, as a launch needs it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(name: str, logits: Tensor, vocab_size: int, one_position: bool = False) -> LogitRows:
    if logits.ndim != 3 or logits.shape[-1] < vocab_size or logits.dtype not in _FLOATING:
        raise ValueError(
            f"{name} must be a floating tensor [B, W, >= {vocab_size}], not {logits.dtype} {list(logits.shape)}: "
            "give every model's logits over the shared vocabulary."
        )
    if logits.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} along the vocabulary; the kernels read it contiguous: call "
            ".contiguous() on it."
        )
    return LogitRows(logits, logits.stride(0), 0 if one_position else logits.stride(1))


def _contiguous_rows(name: str, values: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if values.dtype not in dtypes or values.stride(-1) != 1:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} and contiguous along its last axis, not {values.dtype} "
            f"with strides {values.stride()}."
        )
    return values


def prepare(
    base: Tensor,
    pairs: Sequence[LogitPair],
    parameters: WarpParameters,
    drafts: Tensor,
    vocab_size: int,
    one_position: bool = False,
    name: str = "base",
) -> Prepared:
    """Pointers and feature bits of a law.

    Args:
        base, pairs: logits [B, W, >= V], contiguous along the vocabulary.
        parameters: of the B rows.
        drafts: int64 [B, G].
        vocab_size: V.
        one_position: `base` holds a single position, whatever window position is asked for.
        name: of `base` in messages.

    Raises:
        ValueError: a tensor whose shape, dtype or stride the kernels do not read.
    """
    compute = torch.promote_types(base.dtype, torch.float32)
    anti = 0
    pair_rows = []
    for i, pair in enumerate(pairs):
        compute = torch.promote_types(compute, pair.expert.dtype)
        expert = _rows(f"pairs[{i}].expert", pair.expert, vocab_size)
        anti_expert = expert
        if pair.anti_expert is not None:
            compute = torch.promote_types(compute, pair.anti_expert.dtype)
            anti |= 1 << i
            anti_expert = _rows(f"pairs[{i}].anti_expert", pair.anti_expert, vocab_size)
        pair_rows.append(Pair(expert, anti_expert, pair.alpha, pair.alpha.stride(0), pair.alpha.stride(1)))
    warp, features, filters = _warp(parameters)
    # Where it is not read the length stays 0, lest a kernel be compiled anew for lengths that Triton tells apart.
    reads_prefix = not one_position or features & (REPETITION.value | COUNTS.value)
    prefix = Prefix(drafts.contiguous(), drafts.shape[1] if reads_prefix else 0)
    law = Law(_rows(name, base, vocab_size, one_position), tuple(pair_rows), warp, prefix)
    return Prepared(law, features, filters, anti, _DTYPES[compute])


def _warp(parameters: WarpParameters) -> tuple[Warp, int, int]:
    unread = parameters.temperature.contiguous()
    features = int(SAMPLING) if parameters.any_sampling else 0
    filters = 0
    if parameters.any_sampling:
        asked = ((parameters.top_k, TOP_K), (parameters.top_p, TOP_P), (parameters.min_p, MIN_P))
        filters = sum(int(bit) for values, bit in asked if values is not None)
    seen = counts = bias = allowed = unread
    seen_stride = counts_stride = bias_stride = allowed_row_stride = allowed_position_stride = 0
    if parameters.allowed is not None:
        features |= int(ALLOWED)
        allowed = _contiguous_rows("allowed", parameters.allowed, (torch.int32,))
        allowed_row_stride = allowed.stride(0) if allowed.shape[0] > 1 else 0
        allowed_position_stride = allowed.stride(1) if allowed.shape[1] > 1 else 0
    if parameters.logit_bias is not None:
        features |= int(BIAS)
        bias = _contiguous_rows("logit_bias", parameters.logit_bias, _FLOATING)
        bias_stride = bias.stride(0) if bias.shape[0] > 1 else 0
    if parameters.repetition_penalty is not None:
        features |= int(REPETITION)
        assert parameters.seen is not None, "a repetition penalty needs the tokens seen so far"
        seen = _contiguous_rows("seen", parameters.seen, (torch.bool,)).view(torch.uint8)
        seen_stride = seen.stride(0)
    if parameters.counts is not None:
        features |= int(COUNTS)
        counts = _contiguous_rows("counts", parameters.counts, (torch.int32,))
        counts_stride = counts.stride(0)

    def given(values: Tensor | None) -> Tensor:
        return unread if values is None else values.contiguous()

    warp = Warp(
        temperature=unread,
        top_k=given(parameters.top_k),
        top_p=given(parameters.top_p),
        min_p=given(parameters.min_p),
        repetition_penalty=given(parameters.repetition_penalty),
        seen=seen,
        seen_stride=seen_stride,
        frequency_penalty=given(parameters.frequency_penalty),
        presence_penalty=given(parameters.presence_penalty),
        counts=counts,
        counts_stride=counts_stride,
        bias=bias,
        bias_stride=bias_stride,
        allowed=allowed,
        allowed_row_stride=allowed_row_stride,
        allowed_position_stride=allowed_position_stride,
    )
    return warp, features, filters


def noise_keys(noise: NoiseStream) -> tuple[NoiseKeys, bool]:
    """Keys of a launch, and whether the start of the block enters them."""
    blocks = noise.block_start is not None
    key, start = noise.key.contiguous(), noise.start.contiguous()
    return NoiseKeys(key, start, start if noise.block_start is None else noise.block_start.contiguous()), blocks


def partials(lines: int, splits: int, compute: torch.dtype, device: torch.device, race: bool) -> Partials:
    """Scratch for the partial results of `lines` rows."""
    floats = torch.empty(2, lines, splits, dtype=compute, device=device)
    bad = torch.empty(lines, splits, dtype=torch.int32, device=device)
    if not race:
        return Partials(floats[0], floats[1], bad, bad, bad)
    return Partials(floats[0], floats[1], bad, *race_results(lines, splits, device))


def race_results(lines: int, splits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scratch for the keys and ids of `lines` races."""
    key = torch.empty(lines, splits, dtype=torch.float64, device=device)
    return key, torch.empty(lines, splits, dtype=torch.int32, device=device)


def candidates(lines: int, compute: torch.dtype, device: torch.device) -> Candidates:
    """Scratch for the candidate lists of `lines` rows."""
    size = (lines, CANDIDATES.value)
    return Candidates(
        torch.empty(size, dtype=compute, device=device), torch.empty(size, dtype=torch.int32, device=device)
    )


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count] of the current stream. Launches of one stream share them: each leaves them at zero."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # memory of a graph must not be shared with other launches
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    known = _counters.get((device, stream))
    if known is None or known.shape[0] < count:
        known = torch.zeros(max(1024, 2 * count), dtype=torch.int32, device=device)
        _counters[device, stream] = known
    return known
