"""Clocks: every forward of named models, the first token of a call, peak memory. Knows torch, nothing of decoding."""

from __future__ import annotations

import argparse
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers

from specproxy import __version__

__all__ = [
    "Forward",
    "ForwardClock",
    "Stopwatch",
    "conditions",
    "machine",
    "paired_ratio",
    "peak_memory",
    "synchroniser",
]


def machine(device: torch.device) -> dict[str, Any]:
    """What a record says of where it was made: device, threads, versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "specproxy": __version__,
    }


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a record says of how it was made: ``arguments``, ready for JSON, and ``machine``."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {"arguments": arguments, "machine": machine(device)}


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits for a device's queue: nothing on the CPU."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@dataclass(frozen=True)
class Forward:
    """One forward of a model.

    Args:
        role: the model's name.
        rows, width: shape of its input ids.
        prefill: whether it was the model's first in its call.
        seconds: how long it took.
    """

    role: str
    rows: int
    width: int
    prefill: bool
    seconds: float


class ForwardClock:
    """Times every forward of some models while it is entered.

    Args:
        models: per role, a model; every role a model of its own.
        synchronise: called before and after each forward. Without it forwards of an asynchronous device count their
            launches alone.
    """

    def __init__(self, models: Mapping[str, Any], synchronise: Callable[[], None] = lambda: None) -> None:
        self.models = dict(models)
        self.synchronise = synchronise
        self.forwards: list[Forward] = []
        self.first_ends: dict[str, float] = {}  # when each model's first forward of this call ended
        self._starts: dict[str, float] = {}
        self._handles: list[Any] = []

    def reset(self) -> None:
        """Forget the last call: what comes next is a prefill."""
        self.forwards = []
        self.first_ends = {}

    def __enter__(self) -> ForwardClock:
        for role, model in self.models.items():
            self._handles.append(model.register_forward_pre_hook(self._before(role), with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after(role), with_kwargs=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, role: str) -> Callable[..., None]:
        def start(module: Any, args: Any, kwargs: Any) -> None:
            self.synchronise()
            self._starts[role] = perf_counter()

        return start

    def _after(self, role: str) -> Callable[..., None]:
        def stop(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.synchronise()
            now = perf_counter()
            rows, width = (args[0] if args else kwargs["input_ids"]).shape
            prefill = role not in self.first_ends
            self.first_ends.setdefault(role, now)
            self.forwards.append(Forward(role, rows, width, prefill, now - self._starts[role]))

        return stop


@dataclass
class Stopwatch:
    """Time of a call and of its first token."""

    began: float = field(default_factory=perf_counter)
    first: float | None = None

    def token(self) -> None:
        """A token has come; the first one counts."""
        if self.first is None:
            self.first = perf_counter()


def paired_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of ratios of runs that stood side by side."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the peak since entry, in MiB.

    On CUDA it is torch's allocated memory. On the CPU it is the process's resident memory, the models included; where
    the system cannot reset its peak (other than Linux), it is the peak since the process began.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status")
        status.read_text()
    except OSError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return

    def peak() -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10

    yield peak
