"""Time on a device: medians of events, graph replay, inputs larger than the cache, and the bandwidth of a copy.

On the CPU the wall clock stands in, so that the same code runs there. Knows torch, nothing of what it times.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

__all__ = [
    "Timing",
    "cache_bytes",
    "copy_bandwidth",
    "machine",
    "num_input_sets",
    "short_error",
    "summary",
    "time_calls",
    "time_graph",
]

_MAX_SETS = 128  # of rotating inputs: small ones, which no cache keeps apart, need no more
_TARGET_SECONDS = 0.15  # of measuring, per figure
_MIN_REPEATS, _MAX_REPEATS = 9, 200


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and the ninth deciles over `repeats` measurements."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int

    def asdict(self) -> dict[str, Any]:
        """As JSON holds it, to the nanosecond."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Timing of measured seconds, at least two."""
    deciles = quantiles(seconds, n=10, method="inclusive")
    return Timing(median(seconds) * 1e6, deciles[0] * 1e6, deciles[-1] * 1e6, len(seconds))


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last cache; a guess for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 32 * 2**20


def num_input_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs to rotate through, so that none is still in the cache when its turn comes again.

    On the CPU, which times no kernel, two: enough to run the same code.
    """
    if device.type != "cuda":
        return 2
    wanted = -(-2 * cache_bytes(device) // max(set_bytes, 1))
    fitting = int(0.3 * torch.cuda.get_device_properties(device).total_memory) // max(set_bytes, 1)
    return max(1, min(max(wanted, 2), fitting, _MAX_SETS))


def _repeats(seconds: float) -> int:
    return int(min(max(_TARGET_SECONDS / max(seconds, 1e-9), _MIN_REPEATS), _MAX_REPEATS))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int | None = None) -> Timing:
    """Calls as a program would issue them one after another, a measurement each.

    On a GPU the events stand around each call: where the host is slower than the device, its launches count.

    Args:
        calls: over different inputs, taken in turn; each warms up once.
        repeats: of measurements; by default as many as fit a fraction of a second.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return summary(_wall_times(calls, repeats))
    for call in calls[:3]:
        call()
    torch.cuda.synchronize(device)
    began = perf_counter()
    calls[0]()
    torch.cuda.synchronize(device)
    count = repeats or _repeats(perf_counter() - began)
    events = []
    for number in range(count):
        start, end = _event(), _event()
        start.record()
        calls[number % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return summary([start.elapsed_time(end) / 1e3 for start, end in events])


def _wall_times(calls: Sequence[Callable[[], Any]], repeats: int | None) -> list[float]:
    seconds: list[float] = []
    while len(seconds) < (repeats or _MIN_REPEATS):
        began = perf_counter()
        calls[len(seconds) % len(calls)]()
        seconds.append(perf_counter() - began)
    return seconds


def time_graph(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int | None = None) -> Timing:
    """One CUDA graph of all calls in turn: the time of its replay over their number, without the host.

    Args:
        calls: over different inputs; must be capturable.
        repeats: of replays.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    kept = []  # results: freed ones would let a later call of the graph write where an earlier one still reads
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize(device)
    began = perf_counter()
    graph.replay()
    torch.cuda.synchronize(device)
    count = repeats or _repeats(perf_counter() - began)
    events = [(_event(), _event()) for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    timing = summary([start.elapsed_time(end) / 1e3 / len(calls) for start, end in events])
    del graph, kept
    return timing


def copy_bandwidth(device: torch.device, size: int = 2**31, repeats: int = 30) -> float:
    """Bytes a second of a large copy within the device, counting those read and those written.

    Args:
        size: bytes of the buffer, many times the cache.
    """
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], device, repeats)
    return 2 * source.numel() * 4 / (timing.median_us * 1e-6)


def short_error(error: BaseException) -> str:
    """Kind and first lines of an error, for a record; memory it held on a device is let go."""
    text = " ".join(str(error).split())
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {text[:300]}"


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure cannot be read without: the device, the versions, the time."""
    found = importlib.util.find_spec("triton")
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if found is None else importlib.import_module("triton").__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cache_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
        }
    return record
