"""Compiles, for an H100 and without a GPU, every kernel specialisation that the launch code reaches.

Triton is given a driver that names the architecture `sm_90` and can do nothing else, and every launch is turned into
a compilation. Then the public operations run on CPU tensors over the cases of `benchmarks.kernel_cases`: their results
mean nothing, but the launch code, with its choice of constants, is the real one. Registers, stack and shared memory
are read off the machine code.

A script, because Triton decides at import whether kernels are compiled or interpreted; the tests run the rest of the
suite interpreted. It prints one JSON line on standard output.

Example:
    python tests/kernels/compile_sm90.py --workload quick
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import specproxy_kernels
from benchmarks.kernel_cases import (
    QUICK,
    QUICK_ATTENTION,
    attention_cases,
    build,
    build_attention,
    run_attention,
    run_candidates,
    run_compact,
    run_cycle,
    run_write,
    sampling_cases,
)

ARCHITECTURE = 90
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnlyDriver:
    """What Triton asks of a driver up to the machine code: a target and the numbers of a device and a stream."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Recorder:
    """Every compiled kernel, once, with what the launch chose."""

    def __init__(self) -> None:
        self.kernels: dict[str, tuple[JITFunction, Any, dict[str, Any]]] = {}
        self.failures: dict[str, str] = {}  # what the compiler said, by kernel and constants
        self.launches = 0

    def install(self) -> None:
        """From now on a launch compiles, and does nothing else."""
        driver.set_active(CompileOnlyDriver())
        launch = JITFunction.run

        @functools.wraps(launch)
        def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            self.launches += 1
            named = dict(zip(function.arg_names, args, strict=False)) | kwargs
            constants = {
                param.name: named[param.name] for param in function.params if param.is_constexpr and param.name in named
            }
            try:
                kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:  # the other kernels shall be compiled all the same
                self.failures.setdefault(f"{full_name(function)} {constants}", str(error)[-1500:])
                return None
            self.kernels.setdefault(kernel.hash, (function, kernel, constants))
            return kernel

        JITFunction.run = compile_only

    def report(self) -> list[dict[str, Any]]:
        """A row per kernel: name, constants, warps, and the resources of its machine code."""
        rows = []
        for function, kernel, constants in self.kernels.values():
            used = resources(kernel.asm["cubin"])
            rows.append(
                {
                    "name": full_name(function),
                    "constants": {name: str(value) for name, value in constants.items()},
                    "warps": kernel.metadata.num_warps,
                    "stages": kernel.metadata.num_stages,
                    "registers": used["REG"],
                    "spilled_bytes": used["STACK"] + used["LOCAL"],
                    "shared_bytes": used["SHARED"] + kernel.metadata.shared,
                }
            )
        return sorted(rows, key=lambda row: (row["name"], sorted(row["constants"].items())))


def full_name(function: JITFunction) -> str:
    """Module and name of a kernel."""
    return f"{function.fn.__module__}.{function.fn.__qualname__}"


def resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says of a cubin of one kernel: REG, STACK, SHARED, LOCAL and others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"REG:.*", text)
    assert len(lines) == 1, f"one kernel in a cubin is expected: {text}"
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", lines[0])}


def modules_below(package: ModuleType) -> Iterator[ModuleType]:
    """A package and its modules, imported."""
    yield package
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
        yield importlib.import_module(info.name)


def launched_kernels(package: ModuleType) -> tuple[list[str], list[str]]:
    """Names of the package's kernels, and of its helpers: jitted functions that another jitted one calls."""
    functions = {}
    for module in modules_below(package):
        for value in vars(module).values():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                functions[full_name(value)] = value
    helpers = set()
    for function in functions.values():
        scope = function.fn.__globals__
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.fn)))):
            # A helper is named as such, or through its module.
            called = scope.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = getattr(scope.get(node.value.id), node.attr, None)
            if isinstance(called, JITFunction) and called is not function:
                helpers.add(full_name(called))
    return sorted(set(functions) - helpers), sorted(helpers)


def force_path(package: ModuleType) -> None:
    """Let every module of a package that asks `kernel_path` hear that kernels it is."""
    for module in modules_below(package):
        if hasattr(module, "kernel_path"):
            module.kernel_path = lambda device: "triton"  # type: ignore[attr-defined]


def run_package(full: bool) -> None:
    """The public operations over the cover of cases."""
    force_path(specproxy_kernels)
    for case in sampling_cases("compiled") if full else QUICK:
        run_cycle(specproxy_kernels, build(case))
        run_candidates(specproxy_kernels, build(case))
    for attention_case in attention_cases("compiled") if full else QUICK_ATTENTION:
        problem = build_attention(attention_case)
        run_attention(specproxy_kernels.ragged_attention, problem)
        run_write(specproxy_kernels.write_window, problem)
        run_compact(specproxy_kernels.compact_window, problem)


def run_toy(block: int) -> None:
    """The toy kernels; the spilling one spills at a block of 16384."""
    import toy_kernels

    x, y = torch.empty(3 * block), torch.empty(3 * block)
    toy_kernels.plain_kernel[(1,)](x, y, block, BLOCK=1024)
    toy_kernels.spilling_kernel[(1,)](x, y, 10, BLOCK=block)
    toy_kernels.faulty_kernel[(1,)](x, BLOCK=block)


def main() -> int:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=["quick", "full", "toy-small", "toy-spilling"], default="quick")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, which leaves nothing to compile")
    os.environ["SPECPROXY_KERNELS"] = "triton"
    torch.set_num_threads(1)
    began = time.perf_counter()
    recorder = Recorder()
    recorder.install()
    if options.workload in ("quick", "full"):
        package = importlib.import_module("specproxy_kernels.fused")
        run_package(options.workload == "full")
    else:
        package = importlib.import_module("toy_kernels")
        run_toy(16384 if options.workload == "toy-spilling" else 256)
    kernels, helpers = launched_kernels(package)
    record = {
        "triton": triton.__version__,
        "target": f"sm_{ARCHITECTURE}",
        "defined": kernels,
        "helpers": helpers,
        "launches": recorder.launches,
        "failures": recorder.failures,
        "kernels": recorder.report(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
