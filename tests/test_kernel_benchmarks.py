"""The tools around the kernels: cases and comparison, floors and bars, steps that resume, traces, the two commands."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_suite, kernels
from benchmarks.device_time import Timing, num_input_sets, summary, time_calls, time_graph
from benchmarks.floors import Bar, attention_bytes, draft_bytes, floor_us, judge, verify_bytes
from benchmarks.kernel_cases import (
    ATTENTION_FACTORS,
    SAMPLING_FACTORS,
    AttentionCase,
    Case,
    attention_cases,
    build,
    build_attention,
    compare,
    pairwise,
    run_attention,
    run_cycle,
    sampling_cases,
)
from benchmarks.kernel_checks import check_all, check_attention, check_sampling, different_bits, replayed, summarised
from benchmarks.steps import Skipped, Step, load, run_steps
from benchmarks.trace import device_work_within, marked
from specproxy_kernels import NoiseStream, reference
from specproxy_kernels.attention import ragged_attention_reference

# Cases.


@pytest.mark.parametrize("scale", sorted(SAMPLING_FACTORS))
@pytest.mark.parametrize("factors", [SAMPLING_FACTORS, ATTENTION_FACTORS], ids=["sampling", "attention"])
def test_cover_is_pairwise_and_small(factors: dict[str, Any], scale: str) -> None:
    levels = factors[scale]
    settings = pairwise(levels)
    assert settings == pairwise(levels)
    for a, b in itertools.combinations(levels, 2):
        wanted = set(itertools.product(levels[a], levels[b]))
        assert {(setting[a], setting[b]) for setting in settings} == wanted
    largest, second = sorted(map(len, levels.values()))[-1:-3:-1]
    assert len(settings) <= 2.5 * largest * second


def test_cases_are_named_apart() -> None:
    for scale in SAMPLING_FACTORS:
        cases = [*sampling_cases(scale), *attention_cases(scale)]
        assert len({str(case) for case in cases}) == len(set(cases)) == len(cases)


def test_problem_is_the_same_on_every_call_and_different_under_another_salt() -> None:
    case = Case(filters="all", penalty="both", bias="own", mask="own", pairs="two", content="masked", layout="wider")
    first, again, other = build(case), build(case), build(case, salt=1)
    assert torch.equal(first.base, again.base) and torch.equal(first.key, again.key)
    assert not torch.equal(first.base, other.base) and not torch.equal(first.key, other.key)


@pytest.mark.parametrize("case", sampling_cases("interpreted")[::6], ids=str)
def test_reference_passes_its_own_checks(case: Case) -> None:
    report = check_sampling(case, "cpu", "specproxy_kernels.reference")
    assert not any(report.faults.values()) and set(report.faults) <= {"equal", "rows"}
    assert report.decisions > 0 and report.near == 0


@pytest.mark.parametrize("case", attention_cases("interpreted")[::4], ids=str)
def test_attention_reference_passes_its_own_check(case: AttentionCase) -> None:
    report = check_attention(case, "cpu", checks=("equal",))
    assert report.faults == {"equal": []}


def test_comparison_sees_what_is_wrong() -> None:
    case = Case(filters="top_k", batch=4)
    problem = build(case)
    right = run_cycle(reference, problem)
    assert compare(problem, right, right).faults == []
    vocab = case.vocab_size
    assert right.law is not None and right.law.tau is not None
    wrong = {
        "draft 0": right._replace(tokens=(right.tokens + 1) % vocab),
        "accepted": right._replace(num_accepted=(right.num_accepted + 1) % case.window),
        "next token": right._replace(next_token=(right.next_token + 1) % vocab),
        "no id": right._replace(next_token=right.next_token + vocab),
        "status": right._replace(status=right.status + 1),
        "lse of": right._replace(law=right.law._replace(lse=right.law.lse + 0.01)),
        "tau of": right._replace(law=right.law._replace(tau=right.law.tau - 0.5)),
        "misplaces": right._replace(law=right.law._replace(tau=right.law.tau * torch.nan)),
        "absent": right._replace(law=right.law._replace(tau=None)),
        "off by nan": right._replace(law=right.law._replace(lse=right.law.lse * torch.nan)),
    }
    # Between two logits a threshold may stand anywhere.
    assert compare(problem, right, right._replace(law=right.law._replace(tau=right.law.tau - 1e-4))).faults == []
    for word, outcome in wrong.items():
        faults = compare(problem, right, outcome).faults
        assert faults and any(word in fault for fault in faults), word


class _Moved(NoiseStream):
    """Coins and noise that are off by a little."""

    move = 0.0

    def coins(self, count: int) -> torch.Tensor:
        return super().coins(count) + self.move

    def tokens(self, count: int, vocab_size: int) -> torch.Tensor:
        noise = super().tokens(count, vocab_size)
        return noise + self.move * torch.linspace(0, 1, vocab_size)


def _off_by(move: float) -> Any:
    """A module whose noise is off by so much."""
    stream = type("Stream", (_Moved,), {"move": move})
    module: Any = ModuleType("off")

    def sample_drafts(logits: Any, parameters: Any, drafts: Any, noise: NoiseStream, vocab: int) -> Any:
        moved = stream(noise.key, noise.start, noise.block_start)
        return reference.sample_drafts(logits, parameters, drafts, moved, vocab)

    def verify_window(*arguments: Any) -> Any:
        *first, noise, vocab = arguments
        return reference.verify_window(*first, stream(noise.key, noise.start, noise.block_start), vocab)

    module.sample_drafts, module.verify_window = sample_drafts, verify_window
    module.sample_candidates = reference.sample_candidates
    return module


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_comparison_forgives_rounding_alone(rule: str) -> None:
    problem = build(Case(rule=rule, batch=600, vocab_size=7, window=4))
    right = run_cycle(reference, problem)
    near = compare(problem, right, run_cycle(_off_by(8e-5), problem, right.tokens))
    assert near.faults == []
    far = compare(problem, right, run_cycle(_off_by(0.02), problem, right.tokens))
    assert far.faults


def test_summary_of_checks() -> None:
    module: Any = _off_by(0.5)
    sys.modules["off_by_half"] = module
    try:
        cases = [Case(batch=16, vocab_size=33), Case(rule="coupled", batch=16, vocab_size=33)]
        result, lines = summarised(check_all(check_sampling, cases, "cpu", "off_by_half"))
    finally:
        del sys.modules["off_by_half"]
    assert result["cases"] == 2 and result["checks"]["equal"] == {"cases": 2, "failed": 2}
    assert any(str(cases[0]) in line for line in lines)
    _, errors = summarised(check_all(check_sampling, cases[:1], "cpu", "json"))
    assert len(errors) == 1 and "AttributeError" in errors[0]


def test_bits_are_compared_and_not_values() -> None:
    nan, zero = torch.tensor([torch.nan]), torch.tensor([0.0])
    assert different_bits({"x": nan}, {"x": nan.clone()}) == []
    assert different_bits({"x": zero}, {"x": -zero}) == ["x differs"]
    assert different_bits({"x": zero}, {}) == ["x is on one side only"]


# Floors and bars.


@pytest.mark.parametrize(
    ("vocab", "batch", "window", "rejection", "block"),
    [
        (32_000, 1, 5, 0.4, 0.6),
        (32_000, 8, 5, 3.1, 4.6),
        (32_000, 64, 9, 41, 70),
        (151_936, 1, 5, 1.8, 2.7),
        (151_936, 8, 5, 15, 22),
        (151_936, 64, 9, 194, 331),
    ],
)
def test_floors_at_three_terabytes_a_second(
    vocab: int, batch: int, window: int, rejection: float, block: float
) -> None:
    for rule, expected in (("rejection", rejection), ("block", block)):
        assert floor_us(verify_bytes(rule, batch, window, vocab, 2), 3e12) == pytest.approx(expected, rel=0.09)


def test_bytes_that_must_move() -> None:
    assert verify_bytes("coupled", 2, 3, 100, 2) == verify_bytes("block", 2, 3, 100, 2, greedy=True) == 2 * 3 * 100 * 6
    assert verify_bytes("rejection", 2, 1, 100, 4, num_pairs=2) == 2 * 100 * 4 * 5
    assert verify_bytes("rejection", 2, 1, 100, 2, penalty=True) == 2 * 100 * 6 + 2 * 100
    assert draft_bytes(3, 100, 2) == 600 and draft_bytes(3, 100, 2, penalty=True) == 900
    # Qwen2.5-7B, 8 rows, 4096 keys: 67 MB a layer, 1.9 GB over 28 layers.
    assert attention_bytes(8, 5, 4096, 28, 4, 128, 2) * 28 == pytest.approx(1.9e9, rel=0.02)
    with pytest.raises(ValueError, match="hope"):
        verify_bytes("hope", 1, 1, 1, 1)


def test_bytes_of_attention_problems() -> None:
    case = AttentionCase(4, 2, 16, batch=2, window=3, longest=10)
    assert build_attention(case).kv_bytes() == (3 + 13) * 2 * 2 * 16 * 4
    assert build_attention(case, full=True).kv_bytes() == (13 + 13) * 2 * 2 * 16 * 4
    assert build_attention(AttentionCase(4, 2, 16, 2, 3, 10, sliding_window=2)).kv_bytes() == (3 + 4) * 2 * 2 * 16 * 4


def test_bars_are_judged() -> None:
    assert judge(Bar("a", 1.4, 1.5)).passed and not judge(Bar("a", 1.6, 1.5)).passed
    assert judge(Bar("a", 5.1, 5, at_least=True)).passed and not judge(Bar("a", 4.9, 5, at_least=True)).passed
    missing = judge(Bar("a", None, 5))
    assert not missing.passed and "not measured" in missing.text


def row(part: str, shape: tuple[int, int, int], floor: float, own: float | None, **others: float) -> dict[str, Any]:
    times: dict[str, Any] = {"kernels_graph": None if own is None else Timing(own, own, own, 9).asdict()}
    times |= {way: Timing(value, value, value, 9).asdict() for way, value in others.items()}
    setting = kernels.Setting(part, shape, heads="qwen2.5-7b")
    fields = {name: getattr(setting, name) for name in ("part", "rule", "variant", "flat")}
    made = {"name": str(setting), **fields, "shape": list(shape), "times": times, "errors": {}, "floor_us": floor}
    return kernels._compared(made)


def test_bars_of_rows() -> None:
    def verdicts(row: dict[str, Any]) -> list[bool]:
        return [judge(bar).passed for bar in kernels.bars(row)]

    assert verdicts(row("verify", (151_936, 8, 5), 15, 29, torch_eager=200, torch_compile=90)) == [True] * 3
    assert verdicts(row("verify", (151_936, 8, 5), 15, 31, torch_eager=200, torch_compile=90)) == [False, True, True]
    assert verdicts(row("verify", (151_936, 64, 9), 194, 300, torch_eager=2392)) == [False, True]
    assert verdicts(row("verify", (32_000, 1, 5), 0.4, 14, torch_eager=60)) == [True, False]
    # A replay of the eager reference is the stricter rival where there is one.
    assert verdicts(row("verify", (32_000, 1, 5), 0.4, 10, torch_eager=600, torch_eager_graph=40)) == [True, False]
    assert verdicts(row("verify", (32_000, 1, 5), 0.4, None, torch_eager=60)) == [False, False]
    assert verdicts(row("attention", (4096, 8, 5), 22, 34)) == [False]
    assert verdicts(row("attention", (512, 8, 5), 3, 34)) == []


# Time.


def test_summary_and_clock() -> None:
    timing = summary([3e-6, 1e-6, 2e-6])
    assert timing.median_us == pytest.approx(2) and timing.repeats == 3
    assert timing.p10_us < timing.median_us < timing.p90_us
    called = []
    time_calls([lambda: called.append(0), lambda: called.append(1)], torch.device("cpu"), repeats=5)
    assert called == [0, 1, 0, 1, 0, 1, 0]  # a warm-up each, then in turn
    assert num_input_sets(10, torch.device("cpu")) == 2


class _Event:
    """A device event by the wall clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that answers like a GPU and works nowhere: what is captured runs at once, a replay does nothing."""
    properties = SimpleNamespace(L2_cache_size=1000, total_memory=10_000, name="stand-in", multi_processor_count=1)
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    for name, value in {
        "Event": _Event,
        "Stream": lambda device=None: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "get_device_properties": lambda device: properties,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return SimpleNamespace(type="cuda")


def test_graph_and_rotation(stand_in: Any) -> None:
    called: list[int] = []
    calls = [lambda: called.append(0), lambda: called.append(1)]
    timing = time_graph(calls, stand_in, repeats=4)
    assert called == [0, 1, 0, 1] and timing.repeats == 4 and timing.median_us >= 0
    called.clear()
    assert time_calls(calls, stand_in, repeats=3).repeats == 3
    assert called == [0, 1, 0, 1, 0, 0, 1, 0]  # two warm-ups each, one to see how long it takes, then in turn
    # Twice the cache, unless that takes more than a third of the memory; never more than so many.
    assert [num_input_sets(size, stand_in) for size in (1000, 300, 5000, 1)] == [2, 7, 1, 128]
    assert replayed(lambda: 5) == 5


def test_every_way_of_a_row_is_timed(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    verify_problem, build_problem = kernels.verify_problem, kernels.build_attention
    monkeypatch.setattr(kernels, "verify_problem", lambda setting, device, salt: verify_problem(setting, cpu, salt))
    monkeypatch.setattr(
        kernels, "build_attention", lambda case, device, *rest, **more: build_problem(case, cpu, *rest, **more)
    )
    context = kernels.Context(stand_in, 3e12, repeats=2, max_sets=2)
    ways = {"kernels", "kernels_graph", "torch_eager", "torch_eager_graph", "torch_compile", "torch_compile_graph"}
    for setting in (
        kernels.Setting("verify", (40, 2, 3)),
        kernels.Setting("verify", (40, 2, 3), "greedy", "penalty"),
        kernels.Setting("verify", (40, 2, 3), "block", "top_k_top_p", flat=True),
    ):
        measured = kernels.measure_row(setting, context)
        assert measured["errors"] == {} and set(measured["times"]) == ways, setting
        assert measured["over_floor"] > 0 and set(measured["faster_than"]) == {w for w in ways if "kernels" not in w}
        assert measured["compiled"] == "whole" and json.dumps(measured)
    alone = replace(context, kernels_alone=True)
    assert set(kernels.measure_row(setting, alone)["times"]) == {"kernels", "kernels_graph"}
    attention = kernels.measure_row(kernels.Setting("attention", (40, 2, 3), heads="llama-8b"), context)
    assert attention["errors"] == {}
    assert set(attention["times"]) == ways | {
        "sdpa_grouped",
        "sdpa_grouped_graph",
        "sdpa_expanded",
        "sdpa_expanded_graph",
    }
    row, faults = gpu_suite.timed(kernels.Setting("verify", (40, 1, 5)), context, compile=False)
    assert "torch_compile" not in row["times"] and len(row["bars"]) == 2
    assert all(fault in row["bars"] for fault in faults)


def test_rivals_of_attention_give_the_same() -> None:
    problem = build_attention(AttentionCase(6, 2, 16, 2, 3, 20, buffer="tight"), full=True)
    own = run_attention(ragged_attention_reference, problem)
    rival = scaled_dot_product_attention(
        problem.query,
        problem.keys,
        problem.values,
        attn_mask=kernels.sdpa_mask(problem),
        scale=problem.scaling,
        enable_gqa=True,
    )
    torch.testing.assert_close(rival.transpose(1, 2), own)


def test_peaked_laws_are_peaked() -> None:
    peaked = kernels.verify_problem(kernels.Setting("verify", (32_000, 1, 2)), torch.device("cpu"), 0).base
    flat = kernels.verify_problem(kernels.Setting("verify", (32_000, 1, 2), flat=True), torch.device("cpu"), 0).base
    head = [float(base[0, 0].float().softmax(-1).topk(64).values.sum()) for base in (peaked, flat)]
    assert head[0] > 0.95 and head[1] < 0.2


# Steps.


def test_steps_resume(tmp_path: Path) -> None:
    ran: list[str] = []
    broken = [True]

    def passing() -> Any:
        ran.append("passing")
        return {"figure": 1}, []

    def failing() -> Any:
        ran.append("failing")
        return {}, ["too slow"]

    def erring() -> Any:
        ran.append("erring")
        if broken[0]:
            raise RuntimeError("out of memory")
        return {}, []

    def absent() -> Any:
        raise Skipped("no such tool")

    steps = [Step("passing", passing), Step("failing", failing), Step("erring", erring), Step("absent", absent)]
    said: list[str] = []
    path = tmp_path / "out" / "record.json"

    def run(seconds: float = 1000, again: tuple[str, ...] = ()) -> dict[str, Any]:
        return run_steps(steps, path, {"machine": "m"}, seconds, said.append, again)

    assert run(seconds=10)["missing"] == ["passing", "failing", "erring", "absent"] and ran == []
    record = run()
    statuses = {name: step["status"] for name, step in record["steps"].items()}
    assert statuses == {"passing": "passed", "failing": "failed", "erring": "error", "absent": "skipped"}
    assert record == load(path) and record["missing"] == ["erring"]
    assert record["steps"]["passing"]["result"] == {"figure": 1} and record["steps"]["failing"]["faults"] == [
        "too slow"
    ]
    assert set(record["steps"]["passing"]) == {"status", "seconds", "faults", "result", "about"}
    assert any("out of memory" in fault for fault in record["steps"]["erring"]["faults"])
    broken[0] = False
    assert run()["missing"] == [] and ran == ["passing", "failing", "erring", "erring"]
    run(again=("pass",))
    assert ran[-1] == "passing" and len(ran) == 5
    assert not list(path.parent.glob("*.tmp"))


def test_nothing_runs_on_a_lost_device(tmp_path: Path) -> None:
    ran = []
    steps = [Step(name, lambda name=name: (ran.append(name), ({}, []))[1]) for name in "abc"]  # type: ignore[misc]
    path = tmp_path / "r.json"
    record = run_steps(steps, path, {}, 1000, lambda line: None, broken=lambda: "lost" if "b" in ran else None)
    assert ran == ["a", "b"] and record["missing"] == ["b", "c"]
    assert record["steps"]["b"]["status"] == "error" and record["steps"]["b"]["faults"] == ["lost"]


def test_complete_records_are_dated() -> None:
    about = {"machine": {"time": "2026-11-24T03:00:00+00:00", "device": "NVIDIA H100 80GB HBM3"}}
    record = {"steps": {"a": {"about": about}}}
    assert gpu_suite.dated(record, Path("out/kernels.json")) == Path("out/2026-11-24-h100-80gb-kernels.json")


# Traces.


def test_work_inside_a_stretch_is_found() -> None:
    def event(cat: str, name: str, ts: float, tid: int = 1, dur: float = 1, correlation: int | None = None) -> Any:
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "acceptance", 10, dur=10),
        event("user_annotation", "acceptance", 40, dur=10),
        event("cuda_driver", "cuLaunchKernelEx", 12, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 25, correlation=2),  # between the stretches
        event("cuda_runtime", "cudaLaunchKernel", 12, tid=2, correlation=3),  # another thread
        event("cuda_runtime", "cudaMemcpyAsync", 45, correlation=4),
        event("cuda_runtime", "cudaStreamSynchronize", 46, correlation=5),
        event("kernel", "score_kernel", 100, tid=7, correlation=1),
        event("kernel", "outside", 101, tid=7, correlation=2),
        event("kernel", "elsewhere", 102, tid=7, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH", 103, tid=7, correlation=4),
    ]
    work, waits, stretches = device_work_within(events, "acceptance")
    assert work == {"score_kernel": 1, "Memcpy DtoH": 1}
    assert waits == {"cudaStreamSynchronize": 1} and stretches == 2


def test_marks_are_taken_off() -> None:
    module: Any = ModuleType("module")
    module.work = lambda x: x + 1
    own = module.work
    with marked([module], ["work", "absent"], "label"):
        assert module.work is not own and module.work(1) == 2
    assert module.work is own


# The commands.


def test_command_without_a_gpu_times_the_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device, *size: 1e10)
    arguments = ["--device", "cpu", "--repeats", "2", "--shapes", "300x2x3", "--attention-shapes", "20x2x3"]
    assert kernels.main([*arguments, "--heads", "qwen2.5-7b"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1 and "reference alone" in captured.err
    record = json.loads(captured.out)
    assert set(record) == {"machine", "clock", "bandwidth_tb_per_s", "rows"}
    assert {"time", "device", "python", "torch", "triton", "threads"} <= set(record["machine"])
    names = [row["name"] for row in record["rows"]]
    assert len(set(names)) == len(names) == 4 + 3 + 4 + 3 + 1 + 1
    for measured in record["rows"]:
        assert set(measured["times"]) == {"torch_eager"} and measured["errors"] == {}
        assert {"median_us", "p10_us", "p90_us", "repeats"} == set(measured["times"]["torch_eager"])
        assert measured["over_floor"] is None and measured["faster_than"] == {}


def test_failures_stand_in_the_row() -> None:
    def fails() -> Any:
        raise RuntimeError("cannot\ncompile")

    measured: dict[str, Any] = {"times": {}, "errors": {}}
    kernels._timed("torch_compile", fails, measured)
    assert measured == {"times": {"torch_compile": None}, "errors": {"torch_compile": "RuntimeError: cannot compile"}}


def test_noise_by_itself_is_the_noise_that_is_drawn() -> None:
    """In a process of its own, since Triton chooses its interpreter when it is imported."""
    pytest.importorskip("triton")
    code = """
        import torch
        from benchmarks.noise_floor import largest_noise
        from specproxy_kernels import NoiseStream, row_keys

        key, start = row_keys([3, 3], [0, 1]), torch.tensor([0, 9])
        alone = largest_noise(key, start, 2, 4100)
        drawn = NoiseStream(key, start).tokens(2, 4100)
        assert alone.shape == (2, 2, 2)
        torch.testing.assert_close(alone.amax(-1), drawn.amax(-1))
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_noise_bounds_the_coupled_rule() -> None:
    rows = [row("verify", (100, 1, 2), 5.0, 20.0), row("noise", (100, 1, 2), 0.0, 10.0)]
    rows[0]["rule"] = "coupled"
    kernels.with_noise(rows)
    assert rows[0]["over_arithmetic"] == 2.0 and "over_arithmetic" not in rows[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repeats", "1"], "at least 2"), (["--plot", "chart.png"], "specproxy[bench]"), (["--device", "no"], "device")],
)
def test_refusals(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert kernels.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err


@pytest.mark.parametrize("text", ["5", "5x5", "axbxc", "0x1x1", "1x2x3x4", "1xx2x3"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--shapes", text])


def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    with pytest.raises(Skipped, match="not installed"):
        gpu_suite.sanitizer("memcheck")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "========= $2"\nexit $CODE\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: str(tool))
    monkeypatch.setenv("CODE", "0")
    assert gpu_suite.sanitizer("memcheck") == ({"exit_code": 0, "last": ["========= memcheck"]}, [])
    monkeypatch.setenv("CODE", "9")
    assert gpu_suite.sanitizer("racecheck")[1] == ["racecheck ended with 9", "========= racecheck"]
    sampling, attention = gpu_suite.small_cases()
    assert {case.rule for case in sampling} == {"rejection", "block", "coupled"} and 4 <= len(attention) <= 8


def test_profile_of_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(cat: str, name: str, ts: float, correlation: int) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 9, "tid": 1, "args": {"correlation": correlation}}

    def recorded(run: Any) -> list[dict[str, Any]]:
        run()
        events = [event("user_annotation", "acceptance", 10, 0), event("user_annotation", "drafting", 20, 0)]
        launches = [("score_kernel", 12), ("draft_kernel", 21), ("elementwise_kernel", 22)]
        for number, (name, at) in enumerate(launches, start=1):
            events += [event("cuda_driver", "cuLaunchKernelEx", at, number), event("kernel", name, 50, number)]
        return events

    monkeypatch.setattr(gpu_suite, "profiled", recorded)
    monkeypatch.setattr(gpu_suite, "own_kernel_names", lambda: {"score_kernel", "draft_kernel"})
    result, faults = gpu_suite.generation_profile(torch.device("cpu"), "rejection")
    assert result["acceptance"]["work"] == {"score_kernel": 1} and result["drafting"]["launches_per_call"] == 2
    assert len(faults) == 1 and "elementwise_kernel" in faults[0]


def test_suite_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_suite.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_suite_times_what_the_bars_ask_for() -> None:
    settings = gpu_suite.time_settings()
    names = [str(setting) for setting in settings]
    assert len(set(names)) == len(names)
    verify = {(s.rule, s.variant, s.shape) for s in settings if s.part == "verify"}
    assert {("rejection", "plain", shape) for shape in kernels.SHAPES} <= verify
    assert {rule for rule, _, _ in verify} == set(kernels.RULE_NAMES)
    assert {variant for _, variant, _ in verify} == set(kernels.VARIANTS)
    assert any(s.part == "attention" and s.shape[:2] == (16384, 64) for s in settings)
    assert sum(map(gpu_suite.wants_compile, settings)) < 12


def test_report_of_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"

    def step(status: str, result: Any = None, faults: tuple[str, ...] = ()) -> dict[str, Any]:
        about = {"machine": {"device": "H100"}, "bandwidth_tb_per_s": 3.0}
        return {"status": status, "seconds": 1, "faults": list(faults), "result": result or {}, "about": about}

    timed = row("verify", (151_936, 8, 5), 15, 31, torch_eager=200)
    steps = {"sampling": step("passed"), f"time {timed['name']}": step("failed", timed, ("2.07, wanted <= 2",))}
    for missing, failed, code in (([], True, 1), (["large"], False, 3), ([], False, 0)):
        steps[f"time {timed['name']}"]["status"] = "failed" if failed else "passed"
        path.write_text(json.dumps({"steps": steps, "missing": missing}))
        assert gpu_suite.main(["--out", str(tmp_path), "--report"]) == code
    shown = capsys.readouterr().err
    assert "FAILED time verify" in shown and "2.07, wanted <= 2" in shown and "1 missing" in shown
