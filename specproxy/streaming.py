"""Streaming of batches: tokens by row, as blocks are accepted. Knows nothing of models or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["RowStreamer"]


class RowStreamer:
    """Hands every row's tokens to a function as soon as they are final.

    Args:
        on_tokens: called with the row's index and its new token ids, a block at a time and in order.
        on_end: called with the row's index once it is complete.

    Example:
        >>> texts = {}
        >>> streamer = RowStreamer(lambda row, ids: texts.setdefault(row, []).extend(ids))
        >>> streamer.put_row(0, [5, 6])
        >>> texts
        {0: [5, 6]}
    """

    def __init__(
        self, on_tokens: Callable[[int, Sequence[int]], None], on_end: Callable[[int], None] | None = None
    ) -> None:
        self._on_tokens, self._on_end = on_tokens, on_end

    def put_row(self, row: int, token_ids: Sequence[int]) -> None:
        """Take a row's new tokens."""
        self._on_tokens(row, token_ids)

    def end_row(self, row: int) -> None:
        """Take note that a row is complete."""
        if self._on_end is not None:
            self._on_end(row)
