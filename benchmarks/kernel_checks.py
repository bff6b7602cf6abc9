"""Checks of the kernels on the cases of `kernel_cases`: answers, rows that do not see each other, replayed graphs.

Every check returns a line per fault. The operations are named by their module, so that processes can share the work;
on a machine without a GPU the reference may stand in for the kernels. Knows cases, not devices' settings.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_time import short_error
from benchmarks.kernel_cases import (
    AttentionCase,
    Case,
    Outcome,
    Problem,
    build,
    build_attention,
    compare,
    run_attention,
    run_candidates,
    run_compact,
    run_cycle,
    run_write,
)
from specproxy_kernels import reference
from specproxy_kernels.attention import (
    compact_window_reference,
    ragged_attention_reference,
    write_window_reference,
)

__all__ = ["CaseReport", "check_all", "check_attention", "check_sampling", "replayed", "summarised"]

KERNELS = "specproxy_kernels"


@dataclass
class CaseReport:
    """What the checks of one case found.

    Args:
        faults: lines by check: `equal`, `rows`, `graph`. A check that did not run is absent.
        decisions, near: as in `kernel_cases.Comparison`.
        error: largest relative error of attention, and that of the torch reference, against float64.
    """

    case: str
    faults: dict[str, list[str]] = field(default_factory=dict)
    decisions: int = 0
    near: int = 0
    error: tuple[float, float] | None = None


def replayed(function: Callable[[], Any]) -> Any:
    """The function's result as the second replay of a CUDA graph leaves it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return result


def _parts(outcome: Outcome) -> dict[str, Tensor]:
    parts = {name: getattr(outcome, name) for name in ("tokens", "num_accepted", "next_token", "status")}
    if outcome.law is not None:
        parts["lse"] = outcome.law.lse
        if outcome.law.tau is not None:
            parts["tau"] = outcome.law.tau
    return parts


def different_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit; NaN equals itself."""
    faults = [f"{name} is on one side only" for name in left.keys() ^ right.keys()]
    for name in left.keys() & right.keys():
        same = left[name].shape == right[name].shape and torch.equal(
            left[name].contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8)
        )
        faults += [] if same else [f"{name} differs"]
    return faults


def check_sampling(
    case: Case, device: str, ops: str = KERNELS, checks: Sequence[str] = ("equal", "rows", "graph")
) -> CaseReport:
    """One decode cycle of a case by every check."""
    module = importlib.import_module(ops)
    report = CaseReport(str(case))
    try:
        problem = build(case, device)
        expected = run_cycle(reference, problem)
        got = run_cycle(module, problem, expected.tokens)
        comparison = compare(problem, expected, got)
        report.decisions, report.near = comparison.decisions, comparison.near
        report.faults["equal"] = comparison.faults
        best, expected_best = (run_candidates(ops, problem)[..., 0] for ops in (module, reference))
        apart = int((best != expected_best).sum())
        report.faults["equal"] += [f"best candidates differ at {apart} nodes"] if apart else []
        if "rows" in checks and case.batch > 1:
            report.faults["rows"] = _rows_apart(module, problem, expected.tokens, got)
        if "graph" in checks and torch.device(device).type == "cuda":
            again = replayed(lambda: run_cycle(module, problem, expected.tokens))
            report.faults["graph"] = different_bits(_parts(got), _parts(again))
    except Exception as error:  # one case's failure, a refusal to compile included, is that case's fault
        report.faults["ran"] = [short_error(error)]
    return report


def _rows_apart(module: Any, problem: Problem, drafts: Tensor, whole: Outcome) -> list[str]:
    """A row's result in another place of the batch, and alone, against that in the whole batch."""
    batch = problem.case.batch
    faults = []
    backwards = torch.arange(batch - 1, -1, -1, device=drafts.device)
    for name, rows in (("reversed", backwards), ("alone", backwards[:1])):
        part = run_cycle(module, problem.take(rows), drafts[rows])
        ours = {key: tensor[rows] for key, tensor in _parts(whole).items()}
        faults += [f"{name}: {fault}" for fault in different_bits(ours, _parts(part))]
    return faults


def _relative_error(out: Tensor, exact: Tensor) -> float:
    gap = torch.linalg.vector_norm(out.double() - exact) / torch.linalg.vector_norm(exact)
    return float(gap) if bool(out.isfinite().all()) else float("inf")


def check_attention(
    case: AttentionCase, device: str, ops: str = KERNELS, checks: Sequence[str] = ("equal", "rows", "graph")
) -> CaseReport:
    """Window attention of a case, and the write of a window, by every check.

    Equal means: against the reference in float64, at most twice as wrong as the torch reference in the case's own
    precision, and half an ulp of it more; what is written or moved is the same bit for bit.
    """
    module = importlib.import_module(ops)
    report = CaseReport(str(case))
    try:
        problem = build_attention(case, device)
        out = run_attention(module.ragged_attention, problem)
        wide = replace(problem, **{name: getattr(problem, name).double() for name in ("query", "keys", "values")})
        exact = run_attention(ragged_attention_reference, wide)
        torch_error = _relative_error(run_attention(ragged_attention_reference, problem), exact)
        own_error = _relative_error(out, exact)
        report.error = own_error, torch_error
        report.decisions = out.numel()
        bound = 2 * torch_error + torch.finfo(out.dtype).eps / 2
        report.faults["equal"] = [] if own_error <= bound else [f"relative error {own_error:.3g} above {bound:.3g}"]
        written, expected = (
            dict(zip(("keys", "values"), run_write(write, problem), strict=True))
            for write in (module.write_window, write_window_reference)
        )
        report.faults["equal"] += [f"written: {fault}" for fault in different_bits(written, expected)]
        moved, expected = (
            dict(zip(("keys", "values"), run_compact(compact, problem), strict=True))
            for compact in (module.compact_window, compact_window_reference)
        )
        report.faults["equal"] += [f"moved: {fault}" for fault in different_bits(moved, expected)]
        if "rows" in checks and case.batch > 1:
            backwards = torch.arange(case.batch - 1, -1, -1, device=out.device)
            faults = []
            for name, rows in (("reversed", backwards), ("alone", backwards[:1])):
                part = run_attention(module.ragged_attention, problem.take(rows))
                faults += [f"{name}: {fault}" for fault in different_bits({"out": out[rows]}, {"out": part})]
            report.faults["rows"] = faults
        if "graph" in checks and torch.device(device).type == "cuda":
            again = replayed(lambda: run_attention(module.ragged_attention, problem))
            report.faults["graph"] = different_bits({"out": out}, {"out": again})
    except Exception as error:  # as above
        report.faults["ran"] = [short_error(error)]
    return report


def check_all(
    check: Callable[..., CaseReport], cases: Sequence[Any], device: str, ops: str = KERNELS, workers: int = 1
) -> list[CaseReport]:
    """Check cases, in several processes where `workers` is above 1: compilation takes longer than running.

    Args:
        check: `check_sampling` or `check_attention`.
    """
    one = partial(check, device=device, ops=ops)
    if workers <= 1:
        return [one(case) for case in cases]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(one, cases))


def summarised(reports: Sequence[CaseReport]) -> tuple[dict[str, Any], list[str]]:
    """Counts per check, and a line per fault."""
    checks = sorted({check for report in reports for check in report.faults})
    result: dict[str, Any] = {
        "cases": len(reports),
        "decisions": sum(report.decisions for report in reports),
        "near": sum(report.near for report in reports),
        "checks": {
            check: {
                "cases": sum(check in report.faults for report in reports),
                "failed": sum(bool(report.faults.get(check)) for report in reports),
            }
            for check in checks
        },
    }
    errors = [report.error for report in reports if report.error is not None]
    if errors:
        result["worst_error_over_reference"] = round(max(own / max(other, 1e-12) for own, other in errors), 3)
    lines = [
        f"{report.case}: {check}: {fault}"
        for report in reports
        for check, faults in report.faults.items()
        for fault in faults[:5]
    ]
    # What rounding may account for is rare: were it not, the comparison would say nothing.
    if result["near"] > max(2, result["decisions"] // 500):
        lines.append(f"{result['near']} of {result['decisions']} decisions stood on a rounding's edge")
    return result, lines
