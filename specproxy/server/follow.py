"""Choices followed to their ends: blocks as text, several choices as one stream.

Knows the engine's handles; nothing of the form in which a client is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic

from specproxy.engine import Block, RequestOutput, TokenLogprob
from specproxy.server.errors import WireError
from specproxy.server.metrics import Metrics
from specproxy.server.service import Choice
from specproxy.stats import SpeculationStats

__all__ = ["Piece", "Result", "check_end", "collect", "follow", "follow_all", "release"]


@dataclass
class Piece:
    """What one cycle adds to a choice.

    Args:
        choice: whose it is.
        text: to show; empty where a character or a possible stop string is not complete.
        texts: of each token.
        tokens, sources, logprobs: as in the engine's block.
        block: itself; None in the last piece.
        end: how the choice ended, in its last piece.
    """

    choice: Choice
    text: str = ""
    texts: list[str] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    block: Block | None = None
    end: RequestOutput | None = None


@dataclass
class Result:
    """A whole choice: its text, what each token added to it, and how it ended."""

    choice: Choice
    text: str
    texts: list[str]
    end: RequestOutput

    @property
    def speculation(self) -> SpeculationStats:
        """What speculation did for it."""
        return self.end.statistics


async def follow(choice: Choice, metrics: Metrics) -> AsyncGenerator[Piece, None]:
    """The pieces of a choice, one a cycle, the last with its end.

    Raises:
        WireError: it ended otherwise than with a text.
    """
    handle, text = choice.handle, choice.text
    before = None
    async for block in handle:
        now = monotonic()
        if before is not None:
            metrics.inter_token_latency.observe(now - before)
        before = now
        texts = [text.push(token) for token in block.tokens]
        yield Piece(choice, "".join(texts), texts, block.tokens, block.sources, block.logprobs or (), block)
    output = await handle.wait()
    check_end(output)
    yield Piece(choice, text.finish(), end=output)


def release(choices: Sequence[Choice], metrics: Metrics) -> None:
    """Nobody reads these choices any more: give back the rows of those that have not ended, and count all."""
    for choice in choices:
        if choice.handle.output is None:
            choice.handle.cancel()  # its row is free after the running cycle
        metrics.count(choice.handle)


def check_end(output: RequestOutput) -> None:
    """Hold a request's end against those that are an answer.

    Raises:
        WireError: naming what happened instead.
    """
    if output.finish_reason == "deadline":
        raise WireError(504, "the request has run into the server's time limit.", code="deadline")
    if output.finish_reason == "cancelled":
        raise WireError(503, "the server has ended the request.", code="cancelled")
    if output.finish_reason == "error":
        raise WireError(500, f"the request has failed: {output.error}", code="generation_failed")


async def follow_all(choices: Sequence[Choice], metrics: Metrics) -> AsyncGenerator[Piece, None]:
    """The pieces of several choices as they come. Where one fails all end.

    A reader that is slow holds up nobody: pieces wait in the engine's handles.
    """
    if len(choices) == 1:
        async with aclosing(follow(choices[0], metrics)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(maxsize=len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(follow(choice, metrics)) as pieces:
                async for piece in pieces:
                    await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        left = len(tasks)
        while left:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for choice in choices:
            choice.handle.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(choices: Sequence[Choice], metrics: Metrics) -> list[Result]:
    """All choices, whole and in order."""
    parts: dict[int, list[Piece]] = {choice.index: [] for choice in choices}
    async with aclosing(follow_all(choices, metrics)) as pieces:
        async for piece in pieces:
            parts[piece.choice.index].append(piece)
    results = []
    for choice in choices:
        own = parts[choice.index]
        end = own[-1].end
        assert end is not None, "a choice without an end"
        texts = [text for piece in own for text in piece.texts]
        if texts:
            texts[-1] += own[-1].text
        results.append(Result(choice, "".join(piece.text for piece in own), texts, end))
    return results
