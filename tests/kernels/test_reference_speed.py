"""Speed of the torch reference, which is the CPU's path: cases for pytest-benchmark.

They run once each among the tests. `pytest tests/kernels/test_reference_speed.py -n 0 --benchmark-enable
--benchmark-autosave` times and keeps them, and `--benchmark-compare` holds a later run against that one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernel_cases import (
    AttentionCase,
    Case,
    build,
    build_attention,
    draw,
    draw_all,
    run_attention,
    verify,
)
from specproxy_kernels import reference
from specproxy_kernels.attention import ragged_attention_reference
from specproxy_kernels.laws import combine_logits, warp_law

RULES = ("rejection", "block", "coupled", "greedy")
FILTERS = ("none", "top_k", "top_p", "min_p", "top_k_top_p")


def problem(**settings: Any) -> Any:
    """A cycle of the size that the demo's neighbours have: 2 rows, 4 drafts, 32,000 ids."""
    greedy = settings.get("rule") == "greedy"
    settings |= {"rule": "rejection", "rows": "greedy"} if greedy else {}
    return build(Case(**({"batch": 2, "window": 5, "vocab_size": 32_000} | settings)))


@pytest.mark.parametrize("filters", FILTERS)
def test_sample_drafts(benchmark: Any, filters: str) -> None:
    cycle = problem(filters=filters)
    empty = torch.empty(2, 0, dtype=torch.long)
    tokens, _ = benchmark(lambda: draw(reference, cycle, empty, cycle.noise()))
    assert tokens.shape == (2, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_verify_window(benchmark: Any, rule: str, dtype: str) -> None:
    cycle = problem(rule=rule, dtype=dtype)
    drafts, law = draw_all(reference, cycle, None, cycle.noise())
    accepted, _, status = benchmark(lambda: verify(reference, cycle, drafts, law, cycle.noise()))
    assert bool((accepted <= 4).all()) and not status.any()


@pytest.mark.parametrize("penalty", ["repetition", "counts"])
def test_verify_window_with_penalties(benchmark: Any, penalty: str) -> None:
    cycle = problem(penalty=penalty, filters="top_k_top_p")
    drafts, law = draw_all(reference, cycle, None, cycle.noise())
    _, _, status = benchmark(lambda: verify(reference, cycle, drafts, law, cycle.noise()))
    assert not status.any()


@pytest.mark.parametrize("filters", FILTERS)
def test_warp(benchmark: Any, filters: str) -> None:
    cycle = problem(filters=filters)
    combined, _ = combine_logits(cycle.base, cycle.pairs, 32_000)
    drafts, position = torch.zeros(2, 4, dtype=torch.long), torch.arange(5).expand(2, -1)
    law = benchmark(lambda: warp_law(combined, cycle.parameters, drafts, position))
    assert bool(law.lse.isfinite().all())


def test_noise(benchmark: Any) -> None:
    cycle = problem()
    noise = benchmark(lambda: cycle.noise().tokens(5, 32_000))
    assert noise.shape == (2, 5, 32_000)


@pytest.mark.parametrize("longest", [128, 2048])
@pytest.mark.parametrize("window", [1, 5])
def test_window_attention(benchmark: Any, window: int, longest: int) -> None:
    case = AttentionCase(14, 2, 64, batch=2, window=window, longest=longest)
    problem = build_attention(case)
    out = benchmark(lambda: run_attention(ragged_attention_reference, problem))
    assert out.shape == (2, window, 14, 64)
