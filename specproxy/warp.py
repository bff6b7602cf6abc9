"""From rows' sampling parameters to the tensors that the fused operations read: one warp, for target and draft alike.

Knows nothing of logits, models or windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specproxy.config import SamplingParameters
from specproxy_kernels import WarpParameters

__all__ = ["build_warp", "needs_counts", "needs_seen_tokens"]


def needs_seen_tokens(rows: Sequence[SamplingParameters]) -> bool:
    """Whether some row's law depends on the tokens of its prefix."""
    return any(row.repetition_penalty not in (None, 1.0) for row in rows)


def needs_counts(rows: Sequence[SamplingParameters]) -> bool:
    """Whether some row's law depends on how often its output holds a token."""
    return any(row.counts_output for row in rows)


def build_warp(
    rows: Sequence[SamplingParameters],
    seen: Tensor | None,
    allowed: Tensor | None,
    device: torch.device,
    counts: Tensor | None = None,
) -> WarpParameters:
    """The warp of B rows.

    Args:
        rows: sampling parameters of every row.
        seen: bool [B, V], tokens of every row's prompt and output, or None where no row needs them.
        allowed: int32 [1, 1, ceil(V / 32)], valid ids, or None where all are.
        device: of the result.
        counts: int32 [B, V], how often every row's output holds each token, or None where no row needs them.

    Returns:
        Parameters in which a filter that no row uses is None, so that it costs nothing.
    """

    def column(value: Callable[[SamplingParameters], float], off: float, dtype: torch.dtype) -> Tensor | None:
        values = [value(row) for row in rows]
        if all(v == off for v in values):
            return None
        return torch.tensor(values, dtype=dtype, device=device)

    def when_sampling(row: SamplingParameters, value: float | None, off: float) -> float:
        return value if row.do_sample and value is not None else off

    sampling = [row for row in rows if row.do_sample]
    top_ks = [row.top_k or 0 for row in sampling]
    has_counts = needs_counts(rows)

    def count_penalty(values: list[float | None]) -> Tensor | None:  # the operations take both penalties or neither
        return torch.tensor([v or 0.0 for v in values], dtype=torch.float64, device=device) if has_counts else None

    temperature = [1.0 if row.temperature is None else row.temperature for row in rows]
    return WarpParameters(
        temperature=torch.tensor(
            [t if row.do_sample else 0.0 for t, row in zip(temperature, rows, strict=True)],
            dtype=torch.float64,
            device=device,
        ),
        top_k=column(lambda row: when_sampling(row, row.top_k, 0), 0, torch.long),
        top_p=column(lambda row: when_sampling(row, row.top_p, 1.0), 1.0, torch.float64),
        min_p=column(lambda row: when_sampling(row, row.min_p, 0.0), 0.0, torch.float64),
        repetition_penalty=column(
            lambda row: 1.0 if row.repetition_penalty is None else row.repetition_penalty, 1.0, torch.float64
        ),
        seen=seen,
        frequency_penalty=count_penalty([row.frequency_penalty for row in rows]),
        presence_penalty=count_penalty([row.presence_penalty for row in rows]),
        counts=counts if has_counts else None,
        allowed=allowed,
        max_top_k=max(top_ks) if top_ks and min(top_ks) > 0 else 0,
        any_greedy=len(sampling) < len(rows),
        any_sampling=bool(sampling),
    )
