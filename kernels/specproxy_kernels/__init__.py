"""Operations of proxy-tuned decoding on tensors: logit arithmetic, acceptance sampling, noise, window attention.

Usable without `specproxy`: this package imports torch, and triton where kernels run. Every operation has one torch
reference (`reference`, `attention`, `noise`), which is the oracle of the tests and the path taken on the CPU; `fused`
holds the Triton kernels, and `dispatch` decides between the two.
"""

from specproxy_kernels.attention import (
    compact_window,
    ragged_attention,
    window_attention,
    window_bias,
    write_window,
)
from specproxy_kernels.dispatch import kernel_path, sample_candidates, sample_drafts, verify_window
from specproxy_kernels.laws import (
    LogitPair,
    WarpParameters,
    combine_logits,
    pack_allowed_tokens,
    pair_at,
    take_token,
    unpack_allowed_tokens,
    warp_law,
)
from specproxy_kernels.noise import coin_noise, gumbel_noise, philox, row_keys
from specproxy_kernels.reference import (
    RULES,
    STATUS_EMPTY_RESIDUAL,
    STATUS_EMPTY_SUPPORT,
    STATUS_NON_FINITE,
    Acceptance,
    DraftLaw,
    NoiseStream,
    accept_window,
    emit_next_token,
    sample_next_token,
)

__all__ = [
    "RULES",
    "STATUS_EMPTY_RESIDUAL",
    "STATUS_EMPTY_SUPPORT",
    "STATUS_NON_FINITE",
    "Acceptance",
    "DraftLaw",
    "LogitPair",
    "NoiseStream",
    "WarpParameters",
    "accept_window",
    "coin_noise",
    "combine_logits",
    "compact_window",
    "emit_next_token",
    "gumbel_noise",
    "kernel_path",
    "pack_allowed_tokens",
    "pair_at",
    "philox",
    "ragged_attention",
    "row_keys",
    "sample_candidates",
    "sample_drafts",
    "sample_next_token",
    "take_token",
    "unpack_allowed_tokens",
    "verify_window",
    "warp_law",
    "window_attention",
    "window_bias",
    "write_window",
]
