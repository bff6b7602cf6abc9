"""The parts of the GPU suite that decode whole texts, at tiny sizes on the CPU, and what they do with their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_latency, gpu_memory
from benchmarks.gpu_equality import EqualitySizes, equality_steps
from benchmarks.gpu_latency import LatencySizes, bars, busy_within, latency_steps
from benchmarks.gpu_memory import allocated_bytes, memory_steps
from benchmarks.steps import run_steps
from specproxy import ProxyTunedModel

CPU = torch.device("cpu")


def run(steps: Any, path: Path) -> dict[str, Any]:
    record = run_steps(steps, path, {}, 1e9, lambda line: None)
    errors = {name: step["faults"] for name, step in record["steps"].items() if step["status"] == "error"}
    assert errors == {} and record["missing"] == []
    return record["steps"]


def test_equality_runs(tmp_path):
    sizes = EqualitySizes(prompts=2, slice=1, batch=2, new_tokens=3, dtypes=("float32",))
    some = (
        "graphs arithmetic float32 greedy",
        "graphs arithmetic float32 coupled",
        "kernels arithmetic block",
        "drafts a",
    )
    chosen = [step for step in equality_steps(CPU, sizes) if step.name.startswith(some)]
    done = run(chosen, tmp_path / "equality.json")
    assert all(step["status"] == "passed" for step in done.values())
    assert len(done) == 5
    assert done["drafts arithmetic float32 1-2"]["result"]["sequences"] == 1
    assert done["graphs arithmetic float32 greedy"]["result"]["tokens"] == 6


def test_a_row_that_parts_fails_its_step(monkeypatch, tmp_path):
    own = ProxyTunedModel.generate

    def generate(self: Any, *args: Any, cuda_graphs: bool | None = None, **settings: Any) -> Any:
        output = own(self, *args, **settings)
        if cuda_graphs is not False:
            output.sequences[0, -1] += 1
        return output

    monkeypatch.setattr(ProxyTunedModel, "generate", generate)
    sizes = EqualitySizes(prompts=1, batch=1, new_tokens=2, dtypes=("float32",))
    chosen = [step for step in equality_steps(CPU, sizes) if step.name == "graphs arithmetic float32 greedy"]
    (done,) = run(chosen, tmp_path / "equality.json").values()
    assert done["status"] == "failed" and done["faults"] == ["rows part at [1]"]


def test_latency_runs(tmp_path):
    path = tmp_path / "latency.json"
    tiny = "layers=9,hidden=256"
    sizes = LatencySizes((("tiny", (None, None)), ("wide", (tiny, None))), ("arithmetic",), (1,), (2,), 3, 1, "float32")
    steps = latency_steps(CPU, path, sizes)
    chosen = [step for step in steps if step.name.startswith("tiny") or step.name.endswith("draft_2_rejection")]
    done = run([*chosen, steps[-1]], path)
    ours = done["tiny arithmetic b1 draft_2_rejection"]["result"]
    assert ours["tokens"] == done["tiny arithmetic b1 plain_loop"]["result"]["tokens"] == 3
    assert ours["tokens_per_second"] > 0 and 0 < ours["forward_share"] < 1 and ours["floor_seconds"] > 0
    verdicts = done["tiny bars"]["result"]["bars"]
    assert [name.rpartition(" forward")[0] for name in verdicts] == [
        "tiny arithmetic b1 per_step",
        "tiny arithmetic b1 draft_2_rejection",
    ]
    assert any("not measured" in text for text in done["wide bars"]["faults"])


def figures(**values: float) -> dict[str, Any]:
    steps = {}
    for name, value in values.items():
        result = {"tokens_per_second": value, "forward_share": 0.95, "over_floor": 1.2}
        steps[f"32B+1.5B+1.5B python b1 {name}"] = {"result": result}
        steps[f"14B+0.5B+0.5B python b1 {name}"] = {"result": result}
    return steps


@pytest.mark.parametrize(
    ("draft", "missed"),
    [(21.0, []), (18.0, ["base_generate"]), (15.0, ["per_step", "base_generate"])],
)
def test_bars_of_speculation(draft, missed):
    sizes = LatencySizes(tasks=("python",), batches=(1,), drafts=(4,))
    steps = figures(per_step=10.0, draft_4_rejection=draft, base_generate=10.0)
    _, faults = bars("32B+1.5B+1.5B", steps, sizes)
    assert [fault.partition(" over ")[2].partition(":")[0] for fault in faults] == missed


def test_bars_of_per_step():
    sizes = LatencySizes(tasks=("python",), batches=(1,), drafts=(4,))
    steps = figures(per_step=10.0, draft_4_rejection=20.0, plain_loop=3.0)
    assert bars("14B+0.5B+0.5B", steps, sizes)[1] == []
    steps["14B+0.5B+0.5B python b1 plain_loop"]["result"]["tokens_per_second"] = 4.0
    assert len(bars("14B+0.5B+0.5B", steps, sizes)[1]) == 1
    del steps["14B+0.5B+0.5B python b1 plain_loop"]
    assert "not measured" in bars("14B+0.5B+0.5B", steps, sizes)[1][0]


def test_busy_time_counts_overlapping_work_once():
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", "cycle", 100, 10),
        event("user_annotation", "cycle", 112, 8),
        event("kernel", "a", 95, 7),  # two of it inside
        event("kernel", "b", 104, 4),
        event("kernel", "c", 106, 4),  # beside b for half of its time
        event("gpu_memcpy", "d", 119, 5),  # one inside
        event("cuda_runtime", "cudaLaunchKernel", 110, 5),
    ]
    assert busy_within(events, "cycle") == (20, 9)
    assert busy_within(events, "nothing") == (0.0, 0.0)


def test_memory_runs(tmp_path):
    done = run(memory_steps(CPU, tokens=6, new_tokens=2), tmp_path / "memory.json")
    for step in done.values():
        assert step["status"] == "passed"
        assert step["result"]["tokens"] == 6 and step["result"]["calls"] == 3


def test_memory_that_grows_is_noticed(monkeypatch):
    kept = []
    own = gpu_memory.allocated_bytes

    def hoarding(device: torch.device) -> int:
        kept.append(torch.zeros(2**19))
        return own(device)

    before = allocated_bytes(CPU)
    held = torch.zeros(1000)
    assert allocated_bytes(CPU) - before == held.untyped_storage().nbytes()
    monkeypatch.setattr(gpu_memory, "allocated_bytes", hoarding)
    result, faults = gpu_memory.level(CPU, 6, 2, 0)
    assert result["growth"] >= 2**21 and len(faults) == 1


def test_the_shapes_are_known():
    from benchmarks.grow import SHAPES

    assert {shape for pair in gpu_latency.TRIOS.values() for shape in pair} <= set(SHAPES)
