"""How strong the steering is at each of a row's new tokens: its alpha as a function of their number.

The strength of a token depends on its index alone, never on which cycle or window draws it, so that speculation stays
exact. Knows nothing of models, rows or cycles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.config import check_integer, check_number
from specproxy.errors import ConfigurationError

__all__ = ["CONSTANT", "SCHEDULE_SIZE", "AlphaSchedule", "scheduled_strengths"]

SCHEDULE_SIZE = 3  # numbers that a schedule is on the device: cutoff, rate, floor


@dataclass(frozen=True)
class AlphaSchedule:
    """Strengths over a row's new tokens t = 0, 1, ...: every pair's alpha times f(t),

        f(t) = floor + (1 - floor) * 2^(-t / half_life)   where t < cutoff, else 0

    Without arguments the strength is constant; a cutoff and a decay may be given together.

    Args:
        cutoff: tokens after which the steering stops: from token `cutoff` on the law is the base's own. None never
            stops.
        half_life: tokens in which the strength's excess over `floor` halves, above 0; None does not decay.
        floor: share of alpha, 0 to 1, towards which a decay runs.

    Raises:
        ConfigurationError: a value outside its range, or a floor without a half-life.

    Example:
        >>> AlphaSchedule(cutoff=32, half_life=8, floor=0.25)
        AlphaSchedule(cutoff=32, half_life=8, floor=0.25)
    """

    cutoff: int | None = None
    half_life: float | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.cutoff is not None:
            check_integer("cutoff", self.cutoff, 0, "give a number of tokens, or None for no end")
        if self.half_life is not None and check_number("half_life", self.half_life) <= 0:
            raise ConfigurationError(f"half_life={self.half_life!r} must be above 0 tokens; None does not decay.")
        if not 0 <= check_number("floor", self.floor) <= 1:
            raise ConfigurationError(f"floor={self.floor!r} must be a share of alpha, from 0 to 1.")
        if self.floor and self.half_life is None:
            raise ConfigurationError(f"floor={self.floor!r} bounds a decay; give half_life as well.")

    @property
    def is_constant(self) -> bool:
        """Whether the strength never changes."""
        return self.cutoff is None and self.half_life is None

    @property
    def numbers(self) -> tuple[float, float, float]:
        """What `scheduled_strengths` reads: cutoff, rate in halvings a token, floor."""
        cutoff = math.inf if self.cutoff is None else float(self.cutoff)
        return cutoff, 0.0 if self.half_life is None else 1 / self.half_life, float(self.floor)


CONSTANT = AlphaSchedule()


def scheduled_strengths(alpha: Tensor, numbers: Tensor, index: Tensor) -> Tensor:
    """Strengths of every pair at some of the rows' new tokens.

    Args:
        alpha: float64 [B, pairs].
        numbers: float64 [B, SCHEDULE_SIZE], `AlphaSchedule.numbers` of every row.
        index: int64 [B, W], which new token of its row each column is, from 0.

    Returns:
        float64 [B, W, pairs]; nothing is read on the host.
    """
    cutoff, rate, floor = numbers[:, :, None].unbind(1)  # [B, 1] each
    factor = floor + (1 - floor) * torch.exp2(-index * rate)
    factor = torch.where(index < cutoff, factor, 0.0)
    return alpha[:, None] * factor[..., None]
