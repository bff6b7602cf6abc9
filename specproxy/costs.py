"""What forwards cost: running estimates from measured times, by what ran, how many rows and how wide a window.

A time is the median of the last few, so that a spike counts as one voice; and a wider window is never cheaper, so that
one that took less tells of a spike. Between two measured widths times rise evenly, beyond them a line is drawn through
all. Until two widths are known its slope is assumed, in favour of what has not been tried: wider windows are taken to
be nearly free, narrower ones to be much cheaper. A wrong hope costs one cycle; then it is measured.

Knows nothing of models or tensors.
"""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median_low
from typing import NamedTuple

__all__ = ["CostTable", "ForwardTime"]

_KEPT = 9  # times behind a median
_FLAT, _STEEP = 0.02, 0.25  # cost of one more position over that of a window of one, assumed upward and downward
_STEEPEST = 1.0  # twice the positions never cost more than twice the time
_PRIOR_WEIGHT = 4.0  # of the assumed slope, in times measured one position apart
_FEW = 3  # times that are too few to tell a spike
_LINE_WEIGHT = 2.0  # of the line at a width that was measured, in times


class ForwardTime(NamedTuple):
    """Seconds of one forward of a role's model over `rows` windows of `width` positions."""

    role: str
    rows: int
    width: int
    seconds: float


class _Widths:
    """Times of one kind of work on one number of rows, by width."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._own: dict[int, float] = {}  # medians
        self._medians: dict[int, float] = {}  # the least of a width's own and those of wider ones

    def __contains__(self, width: int) -> bool:
        return width in self._times

    def add(self, width: int, seconds: float) -> None:
        times = self._times.setdefault(width, deque(maxlen=_KEPT))
        times.append(seconds)
        self._own[width] = median_low(times)
        least = inf
        for other in sorted(self._own, reverse=True):
            least = min(least, self._own[other])
            self._medians[other] = least

    def line(self, slope: float) -> tuple[float, float]:
        """Cost of a window of one, and of every further position, given the latter's assumed share of the former."""
        level_level = level_slope = slope_slope = level = rise = 0.0
        for width, times in self._times.items():
            weight, x, y = len(times), width - 1, self._medians[width]
            level_level += weight
            level_slope += weight * x
            slope_slope += weight * x * x
            level += weight * y
            rise += weight * x * y
        level_level += _PRIOR_WEIGHT * slope * slope
        level_slope -= _PRIOR_WEIGHT * slope
        slope_slope += _PRIOR_WEIGHT
        determinant = level_level * slope_slope - level_slope * level_slope
        first = (level * slope_slope - rise * level_slope) / determinant
        further = (rise * level_level - level * level_slope) / determinant
        if further < 0 or first <= 0 or further > _STEEPEST * first:
            # Through the centre of what was measured, as steep as it may be.
            further = 0.0 if further < 0 and first > 0 else _STEEPEST
            weights = [(len(times), width - 1, self._medians[width]) for width, times in self._times.items()]
            first = sum(n * y for n, _, y in weights) / sum(n * (1 + further * x) for n, x, _ in weights)
            further *= first
        return first, further

    @property
    def slope(self) -> float | None:
        """Share of a further position, where two widths have been measured."""
        if len(self._times) < 2:
            return None
        first, further = self.line(_FLAT)
        return further / first if first > 0 else None

    def seconds(self, width: int, slope: float | None) -> float:
        """Estimate at a width; `slope` replaces the assumed one."""
        if slope is None:
            slope = _STEEP if width < min(self._times) else _FLAT
        first, further = self.line(slope)
        line = first + further * (width - 1)
        times = self._times.get(width)
        if times is None:
            below = max((other for other in self._times if other < width), default=None)
            above = min((other for other in self._times if other > width), default=None)
            if below is None or above is None:
                return line
            share = (width - below) / (above - below)
            return (1 - share) * self.seconds(below, slope) + share * self.seconds(above, slope)
        if len(times) < _FEW:
            return min(self._medians[width], line)  # a spike among so few would keep the width from being tried again
        return (len(times) * self._medians[width] + _LINE_WEIGHT * line) / (len(times) + _LINE_WEIGHT)


class CostTable:
    """Running estimates of seconds by kind of work, rows and width. Rows count in powers of two."""

    def __init__(self) -> None:
        self._work: dict[str, dict[int, _Widths]] = {}

    def __contains__(self, work: str) -> bool:
        return work in self._work

    def add(self, work: str, rows: int, width: int, seconds: float) -> bool:
        """Take a time into account.

        Args:
            work: what ran: a role, or any other name.
            rows: at least 1.
            width: positions of the window, at least 1.
            seconds: what it took.

        Returns:
            Whether it is the first of its kind, rows and width.
        """
        widths = self._work.setdefault(work, {}).setdefault(_octave(rows), _Widths())
        is_new = width not in widths
        widths.add(width, seconds)
        return is_new

    def seconds(self, work: str, rows: int, width: int) -> float | None:
        """Estimate for a window.

        Rows that were not measured take the times of the nearest number of rows that was; rows measured at one width
        alone take the slope of the nearest number that was measured at two.

        Returns:
            None where nothing of the kind was measured.
        """
        by_rows = self._work.get(work)
        if not by_rows:
            return None
        octave = _octave(rows)
        nearest = min(by_rows, key=lambda other: (abs(other - octave), other))
        sloped = [other for other, widths in by_rows.items() if widths.slope is not None]
        if nearest in sloped or not sloped:
            return by_rows[nearest].seconds(width, None)
        slope = by_rows[min(sloped, key=lambda other: (abs(other - octave), other))].slope
        return by_rows[nearest].seconds(width, slope)


def _octave(rows: int) -> int:
    """The exponent of the power of two that holds so many rows."""
    return (rows - 1).bit_length()
