"""Requests that wait for the loop. Knows neither rows nor models."""

from __future__ import annotations

from collections import deque
from threading import Condition

from specproxy.engine.requests import Request

__all__ = ["Queue"]


class Queue:
    """Requests that wait, at most so many; shared between callers and the loop.

    Args:
        size: how many may wait.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = Condition()
        self.requests: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self.requests)

    def wake(self) -> None:
        """Let the loop look again."""
        with self.changed:
            self.changed.notify_all()

    def pop(self) -> Request | None:
        """The one that has waited longest."""
        with self.changed:
            return self.requests.popleft() if self.requests else None

    def take(self, unwanted: set[int]) -> None:
        """Take out the requests with these row numbers."""
        with self.changed:
            self.requests = deque(request for request in self.requests if request.row.index not in unwanted)
