"""What a caller holds of a request: its blocks as they come, its end, and the means to give it up.

The engine's thread puts, the caller's takes: in a thread by iteration, in an event loop by asynchronous iteration. The
engine never waits for a reader. What is not read yet is kept, which a request's own `max_new_tokens` bounds. Knows
nothing of models, rows or the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic
from types import TracebackType
from typing import NamedTuple

from specproxy.stats import SpeculationStats

__all__ = ["Block", "RequestHandle", "RequestOutput", "Timings", "TokenLogprob"]


class TokenLogprob(NamedTuple):
    """Natural logarithms of the combined law, before processors, temperature and filters.

    Args:
        token: the token at this place.
        logprob: its own.
        rank: its place in the law, 1 for the likeliest.
        top: the likeliest tokens with theirs, as many as were asked for, best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Block:
    """The tokens of one cycle.

    Args:
        tokens: their ids; an end token is among them.
        sources: for each, "draft" (proposed and accepted) or "target" (residual or bonus).
        logprobs: for each, where the request asked for them.
        drafter: who drafted; None in a cycle without drafts.
        num_draft_tokens: drafts that were verified, as `SpeculationStats` counts them.
        refused: the drafts from the refused one on, in whose place the last token stands; of a tree the first guesses
            from there on, as a chain would have them, and none where the path ended at a leaf.
    """

    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    drafter: str | None = None
    num_draft_tokens: int = 0
    refused: tuple[int, ...] = ()


@dataclass
class Timings:
    """When things happened, on the clock of `time.monotonic`; None for what did not.

    Args:
        submitted: the request entered the queue.
        started: its prompt began to be read.
        first_token: its first block was put.
        ended: it ended.
    """

    submitted: float = field(default_factory=monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None

    @property
    def queue_seconds(self) -> float | None:
        """From submission until its prompt began to be read."""
        return None if self.started is None else self.started - self.submitted

    @property
    def first_token_seconds(self) -> float | None:
        """From submission until its first token."""
        return None if self.first_token is None else self.first_token - self.submitted

    @property
    def total_seconds(self) -> float | None:
        """From submission until its end."""
        return None if self.ended is None else self.ended - self.submitted


@dataclass
class RequestOutput:
    """All of a request that has ended.

    Args:
        request_id: as given, or made.
        tokens: new tokens; an end token is the last.
        sources: for each, "draft" or "target".
        finish_reason: "stop", "length", "cancelled", "deadline" or "error".
        error: what went wrong, where it ended with an error.
        statistics: what speculation did for it.
        timings: when.
        num_prompt_tokens: of the base's prompt.
        num_reused_tokens: leading tokens of it whose keys and values came from another request.
        logprobs: of the new tokens, where asked for.
        prompt_logprobs: of the prompt's tokens, None for the first; where asked for.
    """

    request_id: str
    tokens: list[int]
    sources: list[str]
    finish_reason: str
    error: str | None
    statistics: SpeculationStats
    timings: Timings
    num_prompt_tokens: int
    num_reused_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


class RequestHandle:
    """A request in flight.

    Iteration gives its blocks, each once, and ends with it, whatever the reason: `result()` tells. As a context manager
    it cancels what has not ended when the block is left.

    Args:
        request_id: the request's name.
        wake: called when it is cancelled, so that the engine notices.

    Example:
        >>> handle = RequestHandle("a", wake=lambda: None)
        >>> handle.put(Block((5, 6), ("draft", "target")))
        >>> handle.cancel()
        >>> next(iter(handle)).tokens
        (5, 6)
    """

    def __init__(self, request_id: str, wake: Callable[[], None]) -> None:
        self.request_id = request_id
        self.timings = Timings()
        self._wake = wake
        self._changed = Condition()
        self._blocks: deque[Block] = deque()
        self._output: RequestOutput | None = None
        self._cancelled = False
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    # The engine's side.

    def put(self, block: Block) -> None:
        """Add a block; never waits."""
        with self._changed:
            if self.timings.first_token is None:
                self.timings.first_token = monotonic()
            self._blocks.append(block)
            self._notify()

    def finish(self, output: RequestOutput) -> None:
        """End the request; what has not been read can still be read."""
        with self._changed:
            if self._output is None:
                self.timings.ended = monotonic()
                self._output = output
                self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        for loop, future in sleepers:
            try:
                loop.call_soon_threadsafe(_set, future)
            except RuntimeError:  # the reader's event loop is closed: nobody waits there any more
                continue

    # The caller's side.

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody has asked for its end."""
        return self._cancelled

    @property
    def output(self) -> RequestOutput | None:
        """How it ended; None while it has not."""
        return self._output

    def cancel(self) -> None:
        """Ask for the request's end: its row is free after the running cycle. May be called at any moment."""
        self._cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end, reading nothing.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it has not ended by then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._output is not None, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout} seconds.")
            assert self._output is not None
            return self._output

    async def wait(self) -> RequestOutput:
        """`result` for an event loop."""
        while True:
            with self._changed:
                if self._output is not None:
                    return self._output
                sleeper = self._sleeper()
            await sleeper

    def __iter__(self) -> RequestHandle:
        return self

    def __next__(self) -> Block:
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._output is not None)
            if not self._blocks:
                raise StopIteration
            return self._blocks.popleft()

    def __aiter__(self) -> RequestHandle:
        return self

    async def __anext__(self) -> Block:
        while True:
            with self._changed:
                if self._blocks:
                    return self._blocks.popleft()
                if self._output is not None:
                    raise StopAsyncIteration
                sleeper = self._sleeper()
            await sleeper

    def _sleeper(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._sleepers.append((loop, future))
        return future

    def __enter__(self) -> RequestHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._output is None:
            self.cancel()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
