"""Everything that needs a GPU, in one command of several short calls, in four parts:

    kernels    checks of the kernels, then their times (below)
    equality   whole texts: captured or eager, kernels or reference, drafts or none (`benchmarks/gpu_equality.py`)
    latency    speed at the paper's model shapes (`benchmarks/gpu_latency.py`)
    memory     10,000 tokens at level memory (`benchmarks/gpu_memory.py`)

The steps of `kernels`:

    compile               machine code for everything below, by many processes: it takes longer than running
    sampling, attention   the pairwise cases compiled: the reference's answers; rows that do not see each other; graphs
    large                 the same at 64 rows, windows of 9 and 151,936 ids
    memcheck, racecheck   a few small cases under compute-sanitizer
    profile               a whole `generate`: what the acceptance of a cycle launches, and whether it waits
    time ...              a row of `benchmarks/kernels.py` each, held against its bars

The record of a part, `PART.json` in the output folder, is stored after every step; finished steps are not run again,
so that a call that ran out of time is simply repeated. Exit codes: 0 all passed, 1 some step failed, 2 cannot run here,
3 steps are missing yet.

Example:
    python benchmarks/gpu_suite.py --part kernels --out results --budget-seconds 500
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder only

import torch
from rich.console import Console

import specproxy.accept
import specproxy.draft.expert
import specproxy_kernels
from benchmarks import kernels
from benchmarks.device_time import machine, short_error
from benchmarks.floors import judge
from benchmarks.gpu_equality import equality_steps
from benchmarks.gpu_latency import latency_steps
from benchmarks.gpu_memory import memory_steps
from benchmarks.kernel_cases import Case, attention_cases, build, run_cycle, sampling_cases
from benchmarks.kernel_checks import check_all, check_attention, check_sampling, summarised
from benchmarks.steps import FAILED, FINISHED, Skipped, Step, load, run_steps, store
from benchmarks.tables import require_matplotlib
from benchmarks.trace import device_work_within, marked, profiled
from specproxy import ProxyTunedModel
from specproxy.demo import example_prompts

__all__ = ["LARGE", "PARTS", "kernel_steps", "main", "sanitized", "time_settings"]

Findings = tuple[dict[str, Any], list[str]]

LARGE = tuple(
    Case(rule=rule, filters=filters, penalty=penalty, dtype="bfloat16", vocab_size=151_936, batch=64, window=9)
    for rule, filters, penalty in (
        ("rejection", "none", "none"),
        ("rejection", "top_k_top_p", "repetition"),
        ("block", "top_p", "none"),
        ("coupled", "min_p", "counts"),
    )
)
_SMALL_CASES = 8  # of sampling, that the sanitizers run
_SANITIZER_SECONDS = 240
_PROFILED = ("rejection", "block", "coupled")


# Compilation ahead: Triton keeps machine code on disk, where the steps that follow find it.


def warm(job: tuple[str, Any]) -> str | None:
    """Compile what one job needs, by running it once at two rows; the error, if there is one."""
    kind, what = job
    device = torch.device("cuda")
    try:
        if kind == "case":
            problem = build(replace(what, batch=2), device)
            run_cycle(specproxy_kernels, problem)
        elif kind == "generate":
            generation(device, what)()
        else:
            size, _, window = what.shape
            small = replace(what, shape=(size, 2, window))
            kernels.measure_row(small, kernels.Context(device, 1e12, repeats=2, kernels_alone=True, max_sets=1))
        torch.cuda.synchronize()
    except Exception as error:  # reported with its job; the step that needs it will say more
        return f"{kind} {what}: {short_error(error)}"
    return None


def compile_ahead(settings: Sequence[kernels.Setting], workers: int) -> Findings:
    """Compile for the times, the large cases and the profiles."""
    jobs: list[tuple[str, Any]] = [("case", case) for case in LARGE] + [("generate", rule) for rule in _PROFILED]
    # The batch chooses no machine code.
    jobs += [("time", setting) for setting in {replace(s, shape=(s.shape[0], 2, s.shape[2])) for s in settings}]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        faults = [fault for fault in pool.map(warm, jobs) if fault is not None]
    return {"jobs": len(jobs), "workers": workers}, faults


def on_device(device: torch.device, workers: int) -> dict[str, Callable[[], Findings]]:
    """The steps that compare cases."""
    name = str(device)
    return {
        "sampling": lambda: summarised(check_all(check_sampling, sampling_cases("device"), name, workers=workers)),
        "attention": lambda: summarised(check_all(check_attention, attention_cases("device"), name, workers=workers)),
        "large": lambda: summarised(check_all(check_sampling, LARGE, name)),
    }


# The sanitizers.


def small_cases() -> tuple[list[Any], list[Any]]:
    """The few cases that run under a sanitizer: small, and of every rule."""
    # Of the device's cases, whose machine code is there by then.
    sampling = [case for case in sampling_cases("device") if case.vocab_size <= 2051]
    attention = [case for case in attention_cases("device") if case.longest <= 700]
    return sampling[:: max(1, len(sampling) // _SMALL_CASES)], attention[:: max(1, len(attention) // 4)]


def sanitized() -> int:
    """What runs under the sanitizer: small cases held against the reference on the GPU, without graphs."""
    sampling, attention = small_cases()
    reports = [check_sampling(case, "cuda", checks=("equal",)) for case in sampling]
    reports += [check_attention(case, "cuda", checks=("equal",)) for case in attention]
    _, faults = summarised(reports)
    for fault in faults:
        print(fault)
    torch.cuda.synchronize()
    return 1 if faults else 0


def sanitizer(tool: str) -> Findings:
    """The small cases under a tool of compute-sanitizer.

    Raises:
        Skipped: where compute-sanitizer is not installed.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed on this machine")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitized"]
    # One allocation per tensor: inside torch's pool a read past a tensor would go unseen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_SANITIZER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"command": command[1:5]}, [f"{tool} did not end within {_SANITIZER_SECONDS} s"]
    lines = (done.stdout + done.stderr).splitlines()
    result = {"exit_code": done.returncode, "last": lines[-6:]}
    if done.returncode == 0:
        return result, []
    telling = [line for line in lines if "=========" in line or "Error" in line][:12]
    return result, [f"{tool} ended with {done.returncode}", *telling]


# The profile.


def own_kernel_names() -> set[str]:
    """Names of every jitted function of the package, as a profile shows them."""
    from triton.runtime.jit import JITFunction  # on machines without triton the rest of this file still works

    package = importlib.import_module("specproxy_kernels.fused")
    names = set()
    for info in pkgutil.walk_packages(package.__path__, "specproxy_kernels.fused."):
        module = importlib.import_module(info.name)
        names |= {value.fn.__name__ for value in vars(module).values() if isinstance(value, JITFunction)}
    return names


def generation(device: torch.device, rule: str) -> Callable[[], Any]:
    """A `generate` of the embedded trio with filters and penalties."""
    model = ProxyTunedModel.demo("arithmetic", device=str(device), dtype=torch.bfloat16)
    prompts = [model.tokenizer(text).input_ids for text in example_prompts("arithmetic")[:2]]
    width = min(map(len, prompts))
    ids = torch.tensor([prompt[-width:] for prompt in prompts], device=device)
    warp = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
    return partial(
        model.generate,
        ids,
        max_new_tokens=24,
        num_draft_tokens=4,
        do_sample=True,
        acceptance=rule,
        seed=0,
        cuda_graphs=False,  # a replay would show the launches of the whole cycle at once
        **warp,
    )


def generation_profile(device: torch.device, rule: str) -> Findings:
    """What drafting and acceptance of a cycle launch in that `generate`."""
    generate = generation(device, rule)
    generate()  # compiles
    ours = own_kernel_names()
    result: dict[str, Any] = {}
    faults = []
    with (
        marked([specproxy.accept], ["accept_window", "emit_next_token", "verify_window"], "acceptance"),
        marked([specproxy.draft.expert], ["sample_drafts"], "drafting"),
    ):
        events = profiled(generate)
    for label in ("acceptance", "drafting"):
        work, waits, stretches = device_work_within(events, label)
        result[label] = {
            "calls": stretches,
            "launches_per_call": round(sum(work.values()) / max(stretches, 1), 2),
            "work": dict(work.most_common()),
            "waits": dict(waits),
        }
        foreign = {name: count for name, count in work.items() if name not in ours}
        if not stretches or not work:
            faults.append(f"{rule}: nothing of {label} is seen in the profile")
        if foreign:
            faults.append(f"{rule}: {label} launches what is not its own kernels: {foreign}")
        if waits:
            faults.append(f"{rule}: {label} waits for the device: {dict(waits)}")
    return result, faults


# Times.


def time_settings() -> list[kernels.Setting]:
    """The rows that are timed, those with bars first."""
    settings = [kernels.Setting("verify", shape) for shape in kernels.SHAPES]
    settings += [
        kernels.Setting("attention", (length, batch, kernels.ATTENTION_WINDOW), heads=heads)
        for heads in kernels.HEADS
        for length in kernels.LENGTHS
        for batch in kernels.ATTENTION_BATCHES
    ]
    settings += [kernels.Setting("noise", shape, rule="coupled") for shape in kernels.SHAPES]
    settings += [kernels.Setting("draft", shape) for shape in kernels.SHAPES]
    for variant in ("plain", "top_k_top_p", "penalty", "top_p"):
        for rule in kernels.RULE_NAMES:
            if rule == "greedy" and variant.startswith("top"):
                continue  # filters leave a greedy row alone
            settings += [kernels.Setting("verify", shape, rule, variant) for shape in kernels.SHAPES]
        settings += [kernels.Setting("draft", shape, variant=variant) for shape in kernels.SHAPES]
    settings += [
        kernels.Setting("verify", (151_936, batch, 5), rule, "top_p", flat=True)
        for batch in (1, 8)
        for rule in ("rejection", "coupled")
    ]
    return list(dict.fromkeys(settings))


def wants_compile(setting: kernels.Setting) -> bool:
    """Compiling a reference takes a minute: for the rows that a bar compares, and one shape of every rule."""
    if setting.part != "verify" or setting.variant != "plain":
        return False
    return setting.rule == "rejection" or setting.shape == (151_936, 8, 5)


def timed(setting: kernels.Setting, context: kernels.Context, compile: bool) -> Findings:
    """A row and the bars it misses."""
    context.compile = compile
    row = kernels.measure_row(setting, context)
    verdicts = [judge(bar) for bar in kernels.bars(row)]
    row["bars"] = {verdict.text: verdict.passed for verdict in verdicts}
    faults = [verdict.text for verdict in verdicts if not verdict.passed]
    # Only the kernels' own failure is a fault: what a compiler makes of the reference is its affair, and is recorded.
    own = [f"{row['name']}, {way}: {text}" for way, text in row["errors"].items() if way.startswith("kernels")]
    return row, faults + own


# Parts.


def kernel_steps(device: torch.device, options: argparse.Namespace) -> list[Step]:
    """The steps of the part `kernels`."""
    shared: list[kernels.Context] = []

    def context() -> kernels.Context:
        if not shared:
            shared.append(kernels.make_context(device))
        return shared[0]

    settings = time_settings()
    steps = [Step("compile", lambda: compile_ahead(settings, options.workers), 240)]
    steps += [Step(name, run, 200) for name, run in on_device(device, options.workers).items()]
    steps += [Step(tool, lambda tool=tool: sanitizer(tool), _SANITIZER_SECONDS) for tool in ("memcheck", "racecheck")]  # type: ignore[misc]
    steps += [
        Step(f"profile {rule}", lambda rule=rule: generation_profile(device, rule), 60)  # type: ignore[misc]
        for rule in _PROFILED
    ]
    for setting in settings:
        compiles = options.compile and wants_compile(setting)
        steps.append(
            Step(
                f"time {setting}",
                lambda setting=setting, compiles=compiles: timed(setting, context(), compiles),  # type: ignore[misc]
                90 if compiles else 15,
            )
        )
    return steps


PARTS: dict[str, Callable[[torch.device, argparse.Namespace], list[Step]]] = {
    "kernels": kernel_steps,
    "equality": lambda device, options: equality_steps(device),
    "latency": lambda device, options: latency_steps(device, options.out / "latency.json"),
    "memory": lambda device, options: memory_steps(device),
}


def device_trouble() -> str | None:
    """What the device says after a step: a kernel's illegal access leaves a process without it."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"the device is lost to this process: {' '.join(str(error).split())[:200]}"
    return None


def dated(record: dict[str, Any], path: Path) -> Path:
    """Where a complete record is kept: DATE-DEVICE-PART.json, beside the one that is worked on."""
    about = next(iter(record["steps"].values()))["about"]["machine"]
    device = "-".join(word for word in about["device"].lower().split() if word not in ("nvidia", "hbm3"))
    return path.with_name(f"{about['time'][:10]}-{device}-{path.stem}.json")


def report(record: dict[str, Any], path: Path, console: Console) -> int:
    """Tables, bars and what failed; a chart beside the record where matplotlib is there.

    Returns:
        The exit code.
    """
    steps = record["steps"]
    timings = [step for name, step in steps.items() if name.startswith("time ") and step["result"].get("times")]
    if timings:
        about = timings[-1]["about"]
        rows = {
            "machine": about["machine"],
            "clock": "device events",
            "bandwidth_tb_per_s": about["bandwidth_tb_per_s"],
            "rows": [step["result"] for step in timings],
        }
        kernels.with_noise(rows["rows"])
        kernels.print_rows(console, rows)
        try:
            require_matplotlib()
            kernels.plot(rows, path.with_suffix(".png"))
        except ImportError:
            console.print("no chart: matplotlib is not installed")
    failed = [name for name, step in steps.items() if step["status"] not in FINISHED or step["status"] == FAILED]
    for name in failed:
        for fault in steps[name]["faults"][:6]:
            console.print(f"FAILED {name}: {fault}", markup=False)
    for name, step in steps.items():
        if step["status"] == "skipped":
            console.print(f"skipped {name}: {step['faults'][0]}", markup=False)
    missing = record.get("missing", [])
    passed = sum(step["status"] == "passed" for step in steps.values())
    console.print(f"{passed} steps passed, {len(failed)} failed, {len(missing)} missing; {path.name} holds all of it")
    return 1 if failed else 3 if missing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of a part.

    Returns:
        The exit code, as the module says.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", default="kernels", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--budget-seconds", type=float, default=500.0, help="no step begins that would end later")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of the names of steps to run")
    parser.add_argument("--again", nargs="+", default=[], help="beginnings of the names of finished steps to repeat")
    parser.add_argument("--workers", type=int, default=min(14, max(1, (os.cpu_count() or 2) - 2)))
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out of the times"
    )
    parser.add_argument("--report", action="store_true", help="print what the record holds, and run nothing")
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    path = options.out / f"{options.part}.json"
    console = Console(stderr=True)
    if options.report:
        return report(load(path), path, console)
    if not torch.cuda.is_available():
        print("error: this suite needs a CUDA device; the tests run without one.", file=sys.stderr)
        return 2
    if options.sanitized:
        return sanitized()
    device = torch.device("cuda", torch.cuda.current_device())
    about = {"machine": machine(device), "bandwidth_tb_per_s": round(kernels.make_context(device).bandwidth / 1e12, 3)}
    steps = PARTS[options.part](device, options)
    chosen = [step for step in steps if step.name.startswith(tuple(options.only))] if options.only else steps
    record = run_steps(
        chosen,
        path,
        about,
        options.budget_seconds,
        lambda line: console.print(line, markup=False),
        options.again,
        device_trouble,
    )
    done = record["steps"]
    record["missing"] = [step.name for step in steps if done.get(step.name, {}).get("status") not in FINISHED]
    store(path, record)
    if not record["missing"]:
        store(dated(record, path), record)
    return report(record, path, console)


if __name__ == "__main__":
    sys.exit(main())
