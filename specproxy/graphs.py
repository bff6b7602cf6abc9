"""Captured device work, replayed instead of run: CUDA graphs of a whole cycle, or of one model's forward.

A capture records the device's work and bakes in what Python supplied: numbers, shapes, addresses. So whatever differs
between two calls has to be in the key or in the memory of a tensor that stays where it is. Captures are made lazily and
share one pool of memory; what they read beside it belongs to the caller, who says by a generation when it has moved.

Whether work is captured changes no token. This module knows nothing of models, rows or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar, cast

import torch
from rich.console import Console
from torch import Tensor

from specproxy.errors import ConfigurationError, GraphCaptureError
from specproxy.timing import Events, ForwardTimer, can_time_replays
from specproxy_kernels import kernel_path

__all__ = ["Backend", "Branches", "CudaBackend", "Graphs", "bucket", "make_graphs"]

T = TypeVar("T")

_WARM_UPS = 2  # before a capture: compilation, workspaces and lazy buffers must not fall into it


def bucket(count: int, most: int) -> int:
    """The number of rows that a capture for `count` rows is made for: a power of two, at most `most`."""
    return min(1 << (count - 1).bit_length(), most)


class Branches:
    """Work beside the current stream's, each piece on a stream of its own; without any, everything in its turn.

    A branch begins behind all that stands on the current stream. What it reads has to be kept until `join`, since
    memory that the current stream frees may be given away at once.

    Args:
        device: where branches are made, if at all.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        self._open = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is done within stands on the next branch."""
        if self._device is None:
            yield
            return
        if self._open == len(self._streams):
            self._streams.append(torch.cuda.Stream(self._device))
        stream = self._streams[self._open]
        self._open += 1
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream go on behind every branch."""
        for stream in self._streams[: self._open]:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._open = 0


class Backend(Protocol):
    """Captures device work."""

    def capture(self, run: Callable[[], T], reset: Callable[[], None]) -> tuple[Callable[[], None], T]:
        """Record what `run` does to the device.

        Args:
            run: the work; it may run several times.
            reset: undoes what one run changed; called after every run that took effect.

        Returns:
            What repeats the work, and the result of `run`, whose tensors every repetition writes anew.
        """
        ...


class CudaBackend:
    """CUDA graphs of one device, in one pool of memory.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            can_time_replays()  # asked for here, since a capture must not be disturbed

    def capture(self, run: Callable[[], T], reset: Callable[[], None]) -> tuple[Callable[[], None], T]:
        """See `Backend`; warm-up runs and capture take place on a stream of their own."""
        with torch.cuda.device(self._device):
            main = torch.cuda.current_stream()
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
                    reset()
            main.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only what this one does counts.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        return graph.replay, result


@dataclass
class _Capture:
    generation: Hashable
    replay: Callable[[], None]
    result: Any
    inputs: list[Tensor]
    timings: list[tuple[ForwardTimer, list[Events]]]


class Graphs:
    """Captures by key.

    Args:
        backend: what captures.
    """

    def __init__(self, backend: Backend) -> None:
        self.timers: list[ForwardTimer] = []  # of the forwards inside; a replay reports to them too
        self.seconds = 0.0  # spent in capturing
        self._backend = backend
        self._captures: dict[Hashable, _Capture] = {}
        self._is_capturing = False

    def __len__(self) -> int:
        return len(self._captures)

    def clear(self) -> None:
        """Forget every capture: memory that they refer to may have moved unnoticed."""
        self._captures.clear()

    def run(
        self,
        key: Hashable,
        generation: Hashable,
        run: Callable[..., T],
        inputs: Sequence[Tensor] = (),
        changed: Sequence[Tensor] = (),
        title: str = "",
    ) -> T:
        """Do what `run(*inputs)` does, by replay of a capture.

        Inside another capture the work runs as it stands and becomes part of it.

        Args:
            key: of the capture; all that Python supplies to `run` follows from it.
            generation: of the memory that the work refers to; where it has changed the capture is made anew.
            run: the work, on the device alone.
            inputs: tensors that differ from call to call, of shapes that the key fixes; copied.
            changed: tensors that `run` writes and reads again: put back after warming up.
            title: what the progress display calls the capture.

        Returns:
            The result of `run`. Its tensors hold until the next call with this key.

        Raises:
            GraphCaptureError: the work cannot be captured.
        """
        if self._is_capturing:
            return run(*inputs)
        capture = self._captures.get(key)
        if capture is None or capture.generation != generation:
            self._captures.pop(key, None)
            capture = self._captures[key] = self._capture(generation, run, inputs, changed, title)
        for static, given in zip(capture.inputs, inputs, strict=True):
            static.copy_(given)
        capture.replay()
        for timer, events in capture.timings:
            timer.replayed(events)
        return cast(T, capture.result)

    def _capture(
        self,
        generation: Hashable,
        run: Callable[..., T],
        inputs: Sequence[Tensor],
        changed: Sequence[Tensor],
        title: str,
    ) -> _Capture:
        static = [given.clone() for given in inputs]
        before = [tensor.clone() for tensor in changed]

        def reset() -> None:
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

        began = perf_counter()
        marks = [timer.mark() for timer in self.timers]
        self._is_capturing = True
        try:
            with Console(stderr=True).status(f"Capturing {title or 'work'} ({len(self) + 1})"):
                replay, result = self._backend.capture(lambda: run(*static), reset)
        except Exception as error:
            raise GraphCaptureError(
                f"{title or 'work'} cannot be captured as a CUDA graph ({' '.join(str(error).split())[:300]}); "
                "set cuda_graphs=False."
            ) from error
        finally:
            self._is_capturing = False
            for timer, mark in zip(self.timers, marks, strict=True):
                timer.rewind(mark)  # warming up is not what a forward takes
        self.seconds += perf_counter() - began
        timings = [(timer, timer.take_captured()) for timer in self.timers]
        return _Capture(generation, replay, result, static, timings)


def make_graphs(devices: Collection[torch.device], wanted: bool | None) -> Graphs | None:
    """Graphs for models on these devices, or None to run eagerly.

    Args:
        devices: of all weights.
        wanted: None captures where it can be done: everything on one CUDA device, with the kernels on.

    Raises:
        ConfigurationError: graphs are asked for and cannot be had.
    """
    if wanted is False:
        return None
    names = ", ".join(sorted(map(str, devices)))
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        if wanted:
            raise ConfigurationError(
                f"cuda_graphs=True needs every model on one CUDA device, not on {names}; leave cuda_graphs out."
            )
        return None
    device = next(iter(devices))
    if kernel_path(device) != "triton":
        if wanted:
            raise ConfigurationError("cuda_graphs=True needs the kernels; leave SPECPROXY_KERNELS=torch out.")
        return None
    return Graphs(CudaBackend(device))
