"""What forwards cost: measured times by model and window. Knows nothing of models or tensors."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ForwardTime"]


class ForwardTime(NamedTuple):
    """Seconds of one forward of a role's model over `rows` windows of `width` positions."""

    role: str
    rows: int
    width: int
    seconds: float
