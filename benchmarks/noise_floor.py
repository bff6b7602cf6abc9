"""The random numbers of a draw by themselves: what no kernel that draws them can be faster than. Needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specproxy_kernels.fused.noise import RUN, NoiseKeys, gumbel_of, tile_ids, token_words

__all__ = ["largest_noise"]

_COUNTERS = tl.constexpr(1024)  # four ids each
_SPLIT = tl.constexpr(4096)


@triton.jit
def _noise_kernel(keys, out_pointer, window, vocab_size, splits):
    """Largest Gumbel variable of the token purpose in a split of a row; grid (splits, B * W)."""
    split = tl.program_id(0)
    line = tl.program_id(1)
    first = split * _SPLIT
    w0, w1, w2, w3 = token_words(keys, line // window, line % window, 0, first, _COUNTERS, False)
    lane_0 = tile_ids(first, _COUNTERS)
    largest = tl.full([_COUNTERS], float("-inf"), tl.float32)
    for lane in tl.static_range(4):
        word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
        noise = tl.where(lane_0 + lane * RUN < vocab_size, gumbel_of(word), float("-inf"))
        largest = tl.maximum(largest, noise)
    tl.store(out_pointer + line * splits + split, tl.max(largest, 0))


def largest_noise(key: Tensor, start: Tensor, window: int, vocab_size: int) -> Tensor:
    """The largest noise of every split of every row, float32 [B, W, splits].

    Args:
        key, start: int64 [B], as of `NoiseStream`.
        window, vocab_size: W, V.
    """
    splits = triton.cdiv(vocab_size, _SPLIT.value)
    out = torch.empty(key.shape[0], window, splits, dtype=torch.float32, device=key.device)
    _noise_kernel[(splits, key.shape[0] * window)](
        NoiseKeys(key, start, start), out, window, vocab_size, splits, num_warps=4, enable_fp_fusion=False
    )
    return out
