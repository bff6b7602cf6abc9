"""Which kernels a stretch of a program launched, from a profiler's trace. Knows torch's profiler alone."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["device_work_within", "marked", "profiled"]

_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


@contextmanager
def marked(modules: Iterable[ModuleType], names: Iterable[str], label: str) -> Iterator[None]:
    """Within the context, calls of these functions through these modules stand under a label in a profile."""
    kept: list[tuple[ModuleType, str, Callable[..., Any]]] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with record_function(label):
                return function(*args, **kwargs)

        return labelled

    names = list(names)
    for module in modules:
        for name in names:
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, wrap(kept[-1][2]))
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def profiled(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Events of the trace of one call on a GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def device_work_within(events: Iterable[dict[str, Any]], label: str) -> tuple[Counter[str], Counter[str], int]:
    """What was launched by the host inside the stretches of a label.

    Returns:
        Launches by the name of the kernel, copy or fill; synchronising calls by name; the number of stretches.
    """
    events = [event for event in events if event.get("ph") == "X"]
    stretches: dict[Any, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] == label:
            stretches.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in stretches.values():
        spans.sort()

    def inside(event: dict[str, Any]) -> bool:
        spans = stretches.get(event["tid"], [])
        place = bisect_right(spans, (event["ts"], float("inf"))) - 1
        return place >= 0 and event["ts"] <= spans[place][1]

    calls = [event for event in events if event.get("cat") in _LAUNCHES and inside(event)]
    ours = {event["args"]["correlation"] for event in calls if "correlation" in event.get("args", {})}
    work = Counter(
        event["name"]
        for event in events
        if event.get("cat") in _DEVICE_WORK and event.get("args", {}).get("correlation") in ours
    )
    waits = Counter(event["name"] for event in calls if event["name"] in _WAITS)
    return work, waits, sum(map(len, stretches.values()))
