"""Clocks of forwards, on the host or on the device that runs them. Knows no models."""

from __future__ import annotations

import functools
from time import perf_counter
from typing import Any

import torch

from specproxy.costs import ForwardTime

__all__ = ["Events", "ForwardTimer", "can_time_replays"]

#: Start and end of a forward on a device, and its window [rows, width]; None for a prefill.
Events = tuple[Any, Any, tuple[int, ...] | None]


class ForwardTimer:
    """Seconds spent in a model's forwards, by the clock of its device: in all, and each by itself.

    On CUDA the figures are made from events when they are read, which waits for the forwards to end: read them behind
    a cycle's synchronisation.

    Args:
        role: the model's.
        device: the model's.
    """

    def __init__(self, role: str, device: torch.device) -> None:
        self.role = role
        self._is_cuda = device.type == "cuda"
        self._total = 0.0
        self._forwards: list[ForwardTime] = []
        self._pending: list[Events] = []
        self._captured: list[Events] = []

    @property
    def total(self) -> float:
        """Seconds of all forwards, prefills included."""
        self._collect()
        return self._total

    def take(self) -> list[ForwardTime]:
        """The forwards since the last call; prefills are not among them."""
        self._collect()
        forwards, self._forwards = self._forwards, []
        return forwards

    def begin(self) -> Any:
        """Start of a forward; give what it returns to `end`."""
        if not self._is_cuda:
            return perf_counter()
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing and not can_time_replays():
            return None
        event = torch.cuda.Event(enable_timing=True, external=capturing)
        event.record()
        return event

    def end(self, start: Any, window: tuple[int, ...] | None = None) -> None:
        """End of a forward over a window [rows, width], or of a prefill."""
        if not self._is_cuda:
            self._add(perf_counter() - start, window)
        elif start is not None:
            capturing = torch.cuda.is_current_stream_capturing()
            event = torch.cuda.Event(enable_timing=True, external=capturing)
            event.record()
            (self._captured if capturing else self._pending).append((start, event, window))

    def mark(self) -> tuple[float, list[ForwardTime]]:
        """Where the clock stands, for `rewind`."""
        return self.total, list(self._forwards)

    def rewind(self, mark: tuple[float, list[ForwardTime]]) -> None:
        """Forget the forwards since a mark."""
        self._total, self._forwards = mark
        self._pending = []

    def take_captured(self) -> list[Events]:
        """Events that a capture has recorded since the last call; a replay marks them anew."""
        captured, self._captured = self._captured, []
        return captured

    def replayed(self, events: list[Events]) -> None:
        """A replay has marked these events."""
        self._pending += events

    def _add(self, seconds: float, window: tuple[int, ...] | None) -> None:
        self._total += seconds
        if window is not None:
            self._forwards.append(ForwardTime(self.role, window[0], window[1], seconds))

    def _collect(self) -> None:
        for start, end, window in self._pending:
            if not end.query():
                end.synchronize()
            self._add(start.elapsed_time(end) / 1e3, window)
        self._pending = []


@functools.cache
def can_time_replays() -> bool:
    """Whether events inside a replayed graph can be read as a clock; a driver may not."""
    try:
        events = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="relaxed")
            for event in events:
                event.record()
            graph.capture_end()
            graph.replay()
            stream.synchronize()
        return events[0].elapsed_time(events[1]) >= 0
    except RuntimeError:
        return False
