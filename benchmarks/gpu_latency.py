"""Speed at the paper's model shapes on a device: this runtime, captured, beside what it competes with, and the floor.

The embedded trio is grown to each shape (`benchmarks/grow.py`), so that it decodes at real acceptance and full cost.
Every step is one way of decoding at one batch size: a warm-up, which captures, then repeats, whose median counts.

    TRIO TASK bB NAME        tokens a second, and for this runtime the share of forwards, the floor and acceptance;
                             `overlap` runs the small models beside the base, on streams of their own
    TRIO TASK bB trace NAME  synchronisations a cycle, and the host's share of it, from a profiler's trace
    TRIO bars                what the steps above must reach

A trio's forwards read its weights once each: floor = bytes of the weights that a cycle reads / bandwidth of a copy.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import specproxy.generate
from benchmarks.decoders import Decode, Options, make_decoders
from benchmarks.device_time import copy_bandwidth
from benchmarks.floors import Bar, judge
from benchmarks.grow import cost_parameters, grow
from benchmarks.measure import ForwardClock, synchroniser
from benchmarks.prompts import demo_prompts
from benchmarks.runs import Run, run_once
from benchmarks.steps import Step, load
from benchmarks.trace import device_work_within, marked, profiled
from specproxy import ProxyTunedModel

__all__ = ["TRIOS", "LatencySizes", "bars", "latency_steps"]

Findings = tuple[dict[str, Any], list[str]]

#: Shapes of base and pair.
TRIOS = {"13B+7B+7B": ("13B", "7B"), "32B+1.5B+1.5B": ("32B", "1.5B"), "14B+0.5B+0.5B": ("14B", "0.5B")}
_TRACED = ("per_step", "draft_4_rejection")


@dataclass(frozen=True)
class LatencySizes:
    """How much is decoded.

    Args:
        trios: shapes of base and pair by name; None leaves a model as it is.
        tasks: of the embedded trio.
        batches: rows of a call.
        drafts: numbers of drafts, "auto" among them.
        new_tokens: per row, end tokens ignored.
        repeats: timed ones.
        dtype: a name of torch's.
    """

    trios: tuple[tuple[str, tuple[str | None, str | None]], ...] = tuple(TRIOS.items())
    tasks: tuple[str, ...] = ("arithmetic", "python")
    batches: tuple[int, ...] = (1, 8)
    drafts: tuple[int | str, ...] = (4, 8, "auto")
    new_tokens: int = 128
    repeats: int = 3
    dtype: str = "bfloat16"


class _Bench:
    """One grown trio at a time: a second one would not fit beside it."""

    def __init__(self, device: torch.device, sizes: LatencySizes) -> None:
        self.device, self.sizes = device, sizes
        self._model: ProxyTunedModel | None = None
        self._name: tuple[str, str] | None = None
        self._bandwidth: float | None = None

    @property
    def bandwidth(self) -> float:
        if self._bandwidth is None:
            size = 2**31 if self.device.type == "cuda" else 2**24
            self._bandwidth = copy_bandwidth(self.device, size, 10)
        return self._bandwidth

    def model(self, trio: str, task: str) -> ProxyTunedModel:
        if self._name != (trio, task) or self._model is None:
            bandwidth = self.bandwidth  # while there is room for its buffers
            assert bandwidth > 0
            self._model = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            demo = ProxyTunedModel.demo(task, device=str(self.device), dtype=getattr(torch, self.sizes.dtype))
            base, pair = dict(self.sizes.trios)[trio]
            grown = [
                model if shape is None else grow(model, shape)
                for model, shape in ((demo.base, base), (demo.expert, pair), (demo.anti_expert, pair))
            ]
            self._model, self._name = ProxyTunedModel(*grown, demo.tokenizer, demo.alpha), (trio, task)
        return self._model

    def decoders(self, model: ProxyTunedModel, batch: int) -> dict[str, Decode]:
        """Those of `benchmarks.decoders`, and `overlap`: the first speculative one with the models side by side."""
        pad = model._trio.pad_token_id()
        options = Options(self.sizes.new_tokens, False, 1.0, 0, frozenset(), 0 if pad is None else pad)
        decoders = make_decoders(model, options, list(self.sizes.drafts), ["rejection"], batch)
        plain = decoders[f"draft_{self.sizes.drafts[0]}_rejection"]

        def overlapped(*arguments: Any) -> Any:
            model._trio.overlap = True
            try:
                return plain(*arguments)
            finally:
                model._trio.overlap = False

        return {**decoders, "overlap": overlapped}

    def batch(self, model: ProxyTunedModel, task: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [model.tokenizer(text).input_ids for text in demo_prompts(task, batch)]
        prompts = [prompts[i % len(prompts)] for i in range(batch)]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return ids, mask

    def weights(self, model: ProxyTunedModel, cycles: float, steps: float) -> float:
        """Bytes of weights that `cycles` windows and `steps` forwards of the expert read."""
        size = model.base.dtype.itemsize
        window = cost_parameters(model.base) + cost_parameters(model.anti_expert)
        return size * (cycles * window + steps * cost_parameters(model.expert))

    def run(self, trio: str, task: str, batch: int, name: str) -> Findings:
        """One way of decoding, timed."""
        model = self.model(trio, task)
        decode = self.decoders(model, batch)[name]
        inputs = [self.batch(model, task, batch)]
        synchronise = synchroniser(self.device)
        roles = {"base": model.base, "expert": model.expert, "anti_expert": model.anti_expert}
        with ForwardClock(roles) as clock:
            run_once(decode, inputs, 0, clock, synchronise)
            runs = [run_once(decode, inputs, 0, clock, synchronise) for _ in range(self.sizes.repeats)]
        result: dict[str, Any] = {
            "tokens_per_second": median(run.tokens_per_second for run in runs),
            "seconds": [run.seconds for run in runs],
            "tokens": sum(map(len, runs[0].tokens)),
            "peak_memory_mib": max(run.memory for run in runs),
        }
        if runs[0].speculation:
            result |= self._speculation(model, runs)
        return result, []

    def _speculation(self, model: ProxyTunedModel, runs: list[Run]) -> dict[str, Any]:
        middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        stats = middle.speculation[0]
        windows = max(len(sources) for sources in stats.token_sources) / max(stats.mean_acceptance_length, 1.0)
        drafts = len(stats.drafted_per_position)
        floor = self.weights(model, windows, windows * (drafts + 1)) / self.bandwidth
        forwards = sum(stats.seconds[role] for role in ("base", "expert", "anti_expert"))
        return {
            "forward_share": forwards / stats.seconds["total"],
            "seconds_by_role": stats.seconds,
            "floor_seconds": floor,
            "over_floor": middle.seconds / floor,
            "acceptance_rate": stats.acceptance_rate,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "kernels": stats.kernels,
        }

    def trace(self, trio: str, task: str, batch: int, name: str) -> Findings:
        """Waits of a cycle, and how long the host works between the end of one and the start of the next."""
        model = self.model(trio, task)
        decode = self.decoders(model, batch)[name]
        inputs = [self.batch(model, task, batch)]
        with ForwardClock({"base": model.base}) as clock:

            def once() -> None:
                run_once(decode, inputs, 0, clock, lambda: None)

            once()
            with marked([specproxy.generate], ["step"], "cycle"):
                events = profiled(once)
        _, waits, cycles = device_work_within(events, "cycle")
        total, busy = busy_within(events, "cycle")
        host = 1 - busy / total if total else None
        result = {"cycles": cycles, "waits": dict(waits), "host_share": host}
        per_cycle = sum(waits.values()) / cycles if cycles else None
        verdicts = [
            judge(Bar(f"{trio} {task} b{batch} {name} synchronisations a cycle", per_cycle, 1.0)),
            judge(Bar(f"{trio} {task} b{batch} {name} host share", host, 0.03)),
        ]
        result["bars"] = {verdict.text: verdict.passed for verdict in verdicts}
        return result, [verdict.text for verdict in verdicts if not verdict.passed]


def busy_within(events: list[dict[str, Any]], label: str) -> tuple[float, float]:
    """From the first to the last stretch of a label: time that passed, and time in which the device had work."""
    spans = [e for e in events if e.get("ph") == "X" and e.get("cat") == "user_annotation" and e["name"] == label]
    if not spans:
        return 0.0, 0.0
    begin, end = min(e["ts"] for e in spans), max(e["ts"] + e["dur"] for e in spans)
    work = sorted(
        (max(e["ts"], begin), min(e["ts"] + e["dur"], end))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    busy, reached = 0.0, begin
    for start, stop in work:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return end - begin, busy


def bars(trio: str, steps: dict[str, Any], sizes: LatencySizes) -> Findings:
    """What a trio's finished steps must reach; what has not run counts as missed."""

    def of(task: str, batch: int, name: str, figure: str = "tokens_per_second") -> float | None:
        step = steps.get(f"{trio} {task} b{batch} {name}", {})
        value = step.get("result", {}).get(figure)
        return None if value is None else float(value)

    def ratio(task: str, batch: int, name: str, other: str) -> float | None:
        a, b = of(task, batch, name), of(task, batch, other)
        return None if a is None or b is None else a / b

    checks: list[Bar] = []
    speculative = [f"draft_{count}_rejection" for count in sizes.drafts]
    for task in sizes.tasks:
        for batch in sizes.batches:
            here = f"{trio} {task} b{batch}"
            for name in ("per_step", *speculative):
                checks.append(Bar(f"{here} {name} forward share", of(task, batch, name, "forward_share"), 0.9, True))
            best = [(of(task, batch, name) or 0.0, name) for name in speculative]
            fastest = max(best)[1]
            if trio == "14B+0.5B+0.5B":
                checks.append(
                    Bar(f"{here} per_step over plain_loop", ratio(task, batch, "per_step", "plain_loop"), 3.0, True)
                )
                checks.append(Bar(f"{here} per_step over its floor", of(task, batch, "per_step", "over_floor"), 1.3))
            if trio == "32B+1.5B+1.5B":
                wanted = {"arithmetic": (4.0, 4.0), "python": (1.7, 2.0)}[task]
                for other, least in zip(("per_step", "base_generate"), wanted, strict=True):
                    value = ratio(task, batch, fastest, other)
                    checks.append(Bar(f"{here} {fastest} over {other}", value, least, True))
    verdicts = [judge(bar) for bar in checks]
    return (
        {"bars": {verdict.text: verdict.passed for verdict in verdicts}},
        [verdict.text for verdict in verdicts if not verdict.passed],
    )


def latency_steps(device: torch.device, record: Path, sizes: LatencySizes | None = None) -> list[Step]:
    """The steps of the part `latency`; `record` is where their results are kept."""
    sizes = sizes or LatencySizes()
    bench = _Bench(device, sizes)
    names = ["per_step", *(f"draft_{count}_rejection" for count in sizes.drafts)]
    names += ["overlap", "plain_loop", "base_generate", "base_runtime"]
    steps: list[Step] = []

    def step(name: str, run: Callable[[], Findings], seconds: float) -> None:
        steps.append(Step(name, run, seconds))

    for trio, _ in sizes.trios:
        for task in sizes.tasks:
            for batch in sizes.batches:
                here = f"{trio} {task} b{batch}"
                for name in names:
                    step(f"{here} {name}", lambda a=(trio, task, batch, name): bench.run(*a), 90)  # type: ignore[misc]
                if device.type == "cuda":
                    for name in _TRACED:
                        work = (trio, task, batch, name)
                        step(f"{here} trace {name}", lambda a=work: bench.trace(*a), 90)  # type: ignore[misc]
        step(f"{trio} bars", lambda trio=trio: bars(trio, load(record)["steps"], sizes), 5)  # type: ignore[misc]
    return steps
