"""Kernels as compiled for an H100: no spills, and enough warps at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_sm90.py")

# A multiprocessor of compute capability 9.0 (CUDA C++ programming guide, table of technical specifications).
REGISTERS = 65_536
REGISTER_UNIT = 256  # a warp is given registers in units of so many
MAX_REGISTERS = 255  # of a thread
SHARED_BYTES = 227 * 1024  # of a block, and about that of a multiprocessor
MAX_WARPS, MAX_BLOCKS = 64, 32
# Bytes in flight hide the latency of memory: with 16-byte loads, 8 warps with two loads each hold 8 KiB, and a third
# of the resident warps of a full multiprocessor keep it busy in practice. Fewer than 8 would not.
MIN_RESIDENT_WARPS = 8


def resident_warps(registers: int, shared_bytes: int, warps: int) -> int:
    """Warps that one multiprocessor holds at once of a kernel with so many warps a block."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (per_warp * warps)
    by_shared = SHARED_BYTES // shared_bytes if shared_bytes else MAX_BLOCKS
    return warps * min(by_registers, by_shared, MAX_WARPS // warps, MAX_BLOCKS)


def resource_faults(kernels: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill or take too much, a line each."""
    faults = []
    for kernel in kernels:
        name = f"{kernel['name']} {kernel['constants']}"
        if kernel["spilled_bytes"]:
            faults.append(f"{name} spills {kernel['spilled_bytes']} bytes a thread")
        if kernel["registers"] > MAX_REGISTERS:
            faults.append(f"{name} takes {kernel['registers']} registers")
        if kernel["shared_bytes"] > SHARED_BYTES:
            faults.append(f"{name} takes {kernel['shared_bytes']} bytes of shared memory")
        elif resident_warps(kernel["registers"], kernel["shared_bytes"], kernel["warps"]) < MIN_RESIDENT_WARPS:
            faults.append(f"{name} leaves fewer than {MIN_RESIDENT_WARPS} warps on a multiprocessor")
    return faults


def coverage_faults(record: dict[str, Any]) -> list[str]:
    """Kernels that do not compile, and those that no case launched."""
    launched = {kernel["name"] for kernel in record["kernels"]} | {name.split()[0] for name in record["failures"]}
    faults = [f"{name} does not compile: {error}" for name, error in record["failures"].items()]
    return faults + [f"{name} was never launched" for name in record["defined"] if name not in launched]


def compiled(workload: str, cache: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--workload", workload]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def print_table(record: dict[str, Any]) -> None:
    """Per kernel its specialisations and the range of what they take; seen with `pytest -s`, or where a test fails."""
    table = Table(title=f"{record['target']}, Triton {record['triton']}, {record['seconds']} s")
    for column in ("kernel", "specialisations", "warps", "registers", "shared bytes", "spilled", "resident warps"):
        table.add_column(column, justify="left" if column == "kernel" else "right")

    def span(values: list[int]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"

    for name in sorted({kernel["name"] for kernel in record["kernels"]}):
        rows = [kernel for kernel in record["kernels"] if kernel["name"] == name]
        table.add_row(
            name.removeprefix("specproxy_kernels.fused."),
            str(len(rows)),
            *(span([row[key] for row in rows]) for key in ("warps", "registers", "shared_bytes", "spilled_bytes")),
            span([resident_warps(row["registers"], row["shared_bytes"], row["warps"]) for row in rows]),
        )
    Console(width=150).print(table)


@pytest.mark.parametrize("workload", ["quick", pytest.param("full", marks=pytest.mark.slow)])
def test_every_kernel_compiles_within_its_bounds(workload: str, tmp_path: Path) -> None:
    record = compiled(workload, tmp_path)
    print_table(record)
    assert coverage_faults(record) == []
    assert resource_faults(record["kernels"]) == []
    assert len(record["kernels"]) > 20


def test_check_sees_spills_and_kernels_that_fail_or_are_never_launched(tmp_path: Path) -> None:
    record = compiled("toy-spilling", tmp_path)
    faulty, forgotten = coverage_faults(record)
    assert faulty.startswith("toy_kernels.faulty_kernel {'BLOCK': 16384} does not compile")
    assert forgotten == "toy_kernels.forgotten_kernel was never launched"
    assert record["helpers"] == ["toy_kernels._shifted"]
    (fault,) = resource_faults(record["kernels"])
    assert fault.startswith("toy_kernels.spilling_kernel") and "spills" in fault
    small = compiled("toy-small", tmp_path)
    assert resource_faults(small["kernels"]) == []
    assert [kernel["constants"] for kernel in small["kernels"]] == [{"BLOCK": "1024"}, {"BLOCK": "256"}]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "warps", "expected"),
    [
        (32, 0, 4, 64),  # bounded by warps
        (128, 0, 4, 16),  # by registers: 65536 / (128 * 128)
        (255, 0, 8, 8),
        (33, 0, 1, 32),  # by blocks
        (40, 100 * 1024, 4, 8),  # by shared memory
    ],
)
def test_resident_warps(registers: int, shared_bytes: int, warps: int, expected: int) -> None:
    assert resident_warps(registers, shared_bytes, warps) == expected


def test_bounds_fail_where_they_should() -> None:
    good = {
        "name": "k",
        "constants": {},
        "warps": 4,
        "registers": 64,
        "shared_bytes": 1024,
        "spilled_bytes": 0,
    }
    assert resource_faults([good]) == []
    for change, word in (
        ({"registers": 300}, "registers"),
        ({"shared_bytes": 228 * 1024}, "shared memory"),
        ({"spilled_bytes": 40}, "spills"),
        ({"shared_bytes": 200 * 1024}, "multiprocessor"),
    ):
        assert any(word in fault for fault in resource_faults([good | change]))
