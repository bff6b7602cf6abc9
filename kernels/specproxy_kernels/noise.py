"""Counter-based noise: Philox-4x32-10 in torch, and the uniforms and Gumbel variables made from it.

Every random number of a decode is a pure function of

    (row key, index among the row's generated tokens, purpose, vocabulary index, block start)

so that it depends on no batch slot, no window and no wall clock. The integers equal those of `tl.philox(key, c0, c1,
c2, c3)` bit for bit; floats made from them may differ by an ulp between backends. This module knows nothing about
logits or models.

Counter layout (four 32-bit words):

    c0  vocabulary counter     c1  index among the generated tokens
    c2  purpose                c3  block start + 1 under `block` verification, else 0

One counter yields four words. Within a tile of 1024 vocabulary ids, id = 1024 * tile + 256 * lane + r comes from
counter 256 * tile + r, word `lane`: a Triton program then stores its four words as four contiguous runs.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "PURPOSE_COIN",
    "PURPOSE_RESIDUAL",
    "PURPOSE_TOKEN",
    "coin_noise",
    "gumbel_noise",
    "philox",
    "row_keys",
    "window_noise",
]

PURPOSE_TOKEN = 0  # drafts; under `coupled` the target's tokens as well
PURPOSE_COIN = 1  # acceptance coins
PURPOSE_RESIDUAL = 2  # residual and bonus tokens
_PURPOSE_ROW_KEY = 3

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_TILE, _RUN = 1024, 256

_LARGEST_UNIFORM = 1.0 - 2.0**-24  # float32(2^31 - 1) * 2^-31 rounds to 1, which a strict comparison must never see
_SMALLEST_EXPONENTIAL_UNIFORM = 2.0**-32  # half a step of the 31-bit grid, so that log(0) never appears


def philox(counter: Sequence[Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 on broadcast int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors, values in [0, 2**32), broadcastable with `key`.
        key: int64 tensor, the 64 bits of each key.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter, key)[:4]
    key = key.view(*[1] * (c0.ndim - key.ndim), *key.shape)
    rounds = torch.arange(_ROUNDS, device=key.device).view(-1, *[1] * key.ndim)
    weyl = torch.stack([(key & _MASK) + rounds * _WEYL_0, ((key >> 32) & _MASK) + rounds * _WEYL_1], dim=1)
    multiplier = torch.tensor([_MULTIPLIER_0, _MULTIPLIER_1], device=key.device).view(-1, *[1] * c0.ndim)
    # The two halves of a round are alike but crossed, so both run in one tensor: few operations matter more than few
    # elements on the CPU. High bits are garbage until a product needs exact 32-bit words; int64 products wrap.
    even, odd = torch.stack([c0, c2]), torch.stack([c1, c3])
    for word in weyl.unbind():
        crossed = (even * multiplier).flip(0)
        even = (crossed >> 32).bitwise_xor_(odd).bitwise_xor_(word).bitwise_and_(_MASK)
        odd = crossed
    odd = odd & _MASK
    return even[0], odd[0], even[1], odd[1]


def row_keys(seeds: Sequence[int], row_indices: Sequence[int]) -> Tensor:
    """Keys of rows: 64 bits of Philox(seed, row index), so that neighbouring seeds and rows share nothing.

    Args:
        seeds: one integer per row (reduced modulo 2**64).
        row_indices: the row's index in its call; 0 where every row has a seed of its own.

    Returns:
        int64 [B], on the CPU.
    """
    signed = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
    key = torch.tensor(signed, dtype=torch.int64)
    row = torch.tensor([int(index) & _MASK for index in row_indices], dtype=torch.int64)
    zero = torch.zeros_like(row)
    low, high, _, _ = philox((row, zero, zero + _PURPOSE_ROW_KEY, zero), key)
    return low | (high << 32)


def _uniform(words: Tensor) -> Tensor:
    """float32 uniforms in [0, 1) from the upper 31 bits of 32-bit words."""
    return (words >> 1).to(torch.float32).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM)


def _row_words(key: Tensor, index: Tensor, block_start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    nonce = torch.zeros_like(index) if block_start is None else (block_start[:, None] + 1).expand_as(index)
    return key[:, None, None], index[..., None], nonce[..., None]


def _vocabulary_counters(vocab_size: int, device: torch.device) -> Tensor:
    count = vocab_size if vocab_size <= _RUN else -(-vocab_size // _TILE) * _RUN
    return torch.arange(count, device=device)


def _gumbel(words: tuple[Tensor, ...], vocab_size: int) -> Tensor:
    """float32 [B, N, V] from the words [B, N, C] of the vocabulary's counters."""
    if vocab_size <= _RUN:
        bits = words[0]
    else:
        lanes = [word.unflatten(-1, (-1, _RUN)) for word in words]
        bits = torch.stack(lanes, dim=-2).flatten(-3)[..., :vocab_size]
    uniform = _uniform(bits).clamp_(min=_SMALLEST_EXPONENTIAL_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    key: Tensor, index: Tensor, purpose: int, vocab_size: int, block_start: Tensor | None = None
) -> Tensor:
    """Standard Gumbel noise over the vocabulary at given positions.

    Args:
        key: int64 [B], row keys.
        index: int64 [B, N], index among the row's generated tokens.
        purpose: one of `PURPOSE_TOKEN`, `PURPOSE_RESIDUAL`.
        vocab_size: V.
        block_start: int64 [B], the block's first index; given under `block` verification alone.

    Returns:
        float32 [B, N, V], finite: -log(-log1p(-u)).
    """
    key, index, nonce = _row_words(key, index, block_start)
    counters = _vocabulary_counters(vocab_size, index.device)
    return _gumbel(philox((counters, index, torch.full_like(index, purpose), nonce), key), vocab_size)


def coin_noise(key: Tensor, index: Tensor, block_start: Tensor | None = None) -> Tensor:
    """Acceptance coins, uniform in [0, 1).

    Args:
        key: int64 [B], row keys.
        index: int64 [B, N], index among the row's generated tokens.
        block_start: int64 [B], as in `gumbel_noise`.

    Returns:
        float32 [B, N].
    """
    key, index, nonce = _row_words(key, index, block_start)
    zero = torch.zeros_like(index)
    return _uniform(philox((zero, index, zero + PURPOSE_COIN, nonce), key)[0])[..., 0]


def window_noise(
    key: Tensor, index: Tensor, vocab_size: int, block_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What drafting and accepting a window need, in one pass: token noise and coins, equal to those drawn apart.

    Args:
        key, index, vocab_size, block_start: as in `gumbel_noise`.

    Returns:
        Gumbel noise of the token purpose, float32 [B, N, V], and coins, float32 [B, N].
    """
    key, index, nonce = _row_words(key, index, block_start)
    counters = _vocabulary_counters(vocab_size, index.device)
    coin = counters.new_zeros(1)
    purposes = torch.cat([torch.full_like(counters, PURPOSE_TOKEN), coin + PURPOSE_COIN])
    words = philox((torch.cat([counters, coin]), index, purposes, nonce), key)
    gumbel = _gumbel(tuple(word[..., :-1] for word in words), vocab_size)
    return gumbel, _uniform(words[0][..., -1])
