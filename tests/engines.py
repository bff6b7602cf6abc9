"""Engines for tests: a tiny trio, an engine whose turns the test itself runs, and the text of a request alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tiny
import torch

from specproxy.engine import Engine, RequestHandle, RequestOutput
from specproxy.engine.engine import _serving
from specproxy.engine.scheduler import Scheduler
from specproxy.model import ProxyTunedModel

PROMPTS = tiny.prompts([5, 30, 9, 17, 1, 22, 40, 3], seed=3)


@functools.cache
def model(kind: str = "llama") -> ProxyTunedModel:
    """Shared: for tests that leave it as it was."""
    return ProxyTunedModel(*tiny.shared_trio(kind).models)


class Driven:
    """An engine without a thread: nothing happens between two calls of `turn`."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self.engine, self.scheduler = engine, scheduler

    def submit(self, prompt: Sequence[int], **arguments: Any) -> RequestHandle:
        return self.engine.submit(prompt, **arguments)

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.turn()

    def finish(self, *handles: RequestHandle) -> list[RequestOutput]:
        """Run until nothing is left to do."""
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.scheduler.turn()
        return [handle.result(timeout=0) for handle in handles]

    def assert_empty(self) -> None:
        """See `assert_empty`."""
        assert_empty(self.scheduler)


def assert_empty(scheduler: Scheduler) -> None:
    """No row, no position and no request is left anywhere."""
    assert not (scheduler.has_work or scheduler.state.rows or scheduler.running or scheduler.reading)
    for runner in scheduler.runners:
        assert set(runner.cache.host_lengths) == {0}, runner.role
        assert not runner.cache.lengths.any(), runner.role
    assert not scheduler.state._buffers["remaining"].any()
    assert scheduler.prefixes.positions <= scheduler.prefixes.max_positions


@contextmanager
def driven(proxy: ProxyTunedModel | None = None, **options: Any) -> Iterator[Driven]:
    """An engine of which the test runs every turn."""
    engine = Engine(model() if proxy is None else proxy, **options)
    engine._shared.thread = threading.current_thread()  # it has one already, so it starts none
    try:
        with _serving(engine._shared) as scheduler:
            yield Driven(engine, scheduler)
        engine._shared.end("cancelled", None)
    finally:
        engine.close()


def alone(prompt: Sequence[int], proxy: ProxyTunedModel | None = None, **arguments: Any) -> list[int]:
    """The tokens of one row of `generate`."""
    proxy = model() if proxy is None else proxy
    for role, ids in arguments.pop("role_prompts", {}).items():
        arguments[f"{role}_input_ids"] = torch.tensor([ids])
    tokens: list[int] = proxy.generate(torch.tensor([list(prompt)]), **arguments)[0, len(prompt) :].tolist()
    return tokens


def once(function: Callable[..., Any], error: BaseException, call: int = 1, times: int = 1) -> Callable[..., Any]:
    """`function`, but calls from the given one on raise, so many times."""
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if call <= calls < call + times:
            raise error
        return function(*args, **kwargs)

    return wrapped
