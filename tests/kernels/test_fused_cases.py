"""The kernels on the pairwise cases, against the reference and against themselves in other batches.

Interpreted where there is no GPU, which takes seconds a case. Every sampling case is held against the reference each
time; the other checks take a fifth of the cases, and the rest with -m slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import quick_interpreter

from benchmarks.kernel_cases import AttentionCase, Case, attention_cases, sampling_cases
from benchmarks.kernel_checks import check_attention, check_sampling

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = "device" if torch.cuda.is_available() else "interpreted"
# The interpreter computes with NumPy, which warns where infinities are subtracted or logarithms taken of zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def thinned(cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if i % 5 else []) for i, c in enumerate(cases)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SPECPROXY_KERNELS", "triton")
    with quick_interpreter():
        yield


@pytest.mark.parametrize("case", sampling_cases(SCALE), ids=str)
def test_sampling(case: Case) -> None:
    report = check_sampling(case, DEVICE, checks=("equal",))
    assert not any(report.faults.values()), report
    assert report.near <= 1


@pytest.mark.parametrize("case", thinned(sampling_cases(SCALE)))
def test_sampled_rows_do_not_see_each_other(case: Case) -> None:
    report = check_sampling(case, DEVICE, checks=("rows",))
    assert not any(report.faults.values()), report


@pytest.mark.parametrize("case", thinned(attention_cases(SCALE)))
def test_attention(case: AttentionCase) -> None:
    report = check_attention(case, DEVICE, checks=("equal", "rows"))
    assert not any(report.faults.values()), report
