"""Checks of a whole `generate` on a device: captured against eager, kernels against the reference, drafts or none.

    graphs TASK DTYPE LAW    captured cycles give the tokens of eager ones
    kernels TASK LAW         in float32 the kernels give the tokens of the torch reference on the same device
    drafts TASK DTYPE a-b    how many of those prompts part from per-step decoding, greedily, and at what margins

Steps of `benchmarks/gpu_suite.py`; on the CPU the same code runs eagerly, so that a test can hold it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.near_ties import compare, first_difference
from benchmarks.prompts import demo_prompts
from benchmarks.steps import Step
from specproxy import ProxyTunedModel
from specproxy.demo import tasks

__all__ = ["EqualitySizes", "equality_steps"]

Findings = tuple[dict[str, Any], list[str]]

LAWS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "rejection": {"do_sample": True, "top_k": 0, "temperature": 0.9},
    "block": {"do_sample": True, "top_k": 50, "top_p": 0.95, "acceptance": "block"},
    "coupled": {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1, "acceptance": "coupled"},
}
_FORGIVEN = 0.02  # share of sequences that rounding may part between kernels and reference, whose sums differ in order


@dataclass(frozen=True)
class EqualitySizes:
    """How much is compared.

    Args:
        prompts: of each task, in the comparison with per-step decoding; the others take `batch` of them.
        slice: prompts of one step.
        batch: ragged rows of one call.
        new_tokens: per row.
        dtypes: names of torch's.
    """

    prompts: int = 100
    slice: int = 25
    batch: int = 5
    new_tokens: int = 256
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@cache
def _model(task: str, device: torch.device, dtype: str) -> ProxyTunedModel:
    return ProxyTunedModel.demo(task, device=str(device), dtype=getattr(torch, dtype))


def _rows(model: ProxyTunedModel, task: str, sizes: EqualitySizes, **settings: Any) -> list[list[int]]:
    """New tokens of a ragged batch."""
    prompts = [model.tokenizer(text).input_ids for text in demo_prompts(task, sizes.batch)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output: Any = model.generate(
        ids, mask, max_new_tokens=sizes.new_tokens, seed=3, return_dict_in_generate=True, **settings
    )
    lengths = [len(sources) for sources in output.speculation.token_sources]
    rows = output.sequences[:, width:].tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def _parted(got: list[list[int]], expected: list[list[int]]) -> dict[str, Any]:
    places = [first_difference(a, b) for a, b in zip(got, expected, strict=True)]
    return {"rows": len(places), "tokens": sum(map(len, expected)), "parted_at": [p for p in places if p is not None]}


def captured_against_eager(task: str, dtype: str, law: str, device: torch.device, sizes: EqualitySizes) -> Findings:
    """The same tokens, bit for bit the same work: nothing is forgiven."""
    model = _model(task, device, dtype)
    captures = True if device.type == "cuda" else None
    result = _parted(
        _rows(model, task, sizes, cuda_graphs=captures, **LAWS[law]),
        _rows(model, task, sizes, cuda_graphs=False, **LAWS[law]),
    )
    return result, [f"rows part at {result['parted_at']}"] if result["parted_at"] else []


@contextmanager
def _kernels(path: str) -> Iterator[None]:
    before = os.environ.get("SPECPROXY_KERNELS")
    os.environ["SPECPROXY_KERNELS"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPECPROXY_KERNELS"]
        else:
            os.environ["SPECPROXY_KERNELS"] = before


def kernels_against_reference(task: str, law: str, device: torch.device, sizes: EqualitySizes) -> Findings:
    """The kernels' tokens in float32 beside those of the reference."""
    model = _model(task, device, "float32")
    with _kernels("torch"):
        expected = _rows(model, task, sizes, **LAWS[law])
    with _kernels("auto"):
        result = _parted(_rows(model, task, sizes, **LAWS[law]), expected)
    # A tie that rounds the other way parts a row for good: bounded per token.
    most = max(1, round(_FORGIVEN * result["rows"]))
    faults = [f"{len(result['parted_at'])} rows part"] if len(result["parted_at"]) > most else []
    return result, faults


def drafts_against_per_step(
    task: str, dtype: str, first: int, last: int, device: torch.device, sizes: EqualitySizes
) -> Findings:
    """Greedy speculation beside per-step decoding: a finding, not a bar."""
    prompts = demo_prompts(task, last)[first:last]
    return compare(_model(task, device, dtype), prompts, sizes.new_tokens, 4), []


def equality_steps(device: torch.device, sizes: EqualitySizes | None = None) -> list[Step]:
    """The steps of the part `equality`."""
    sizes = sizes or EqualitySizes()
    steps: list[Step] = []
    for task in tasks():
        for law in LAWS:
            for dtype in sizes.dtypes:
                steps.append(
                    Step(
                        f"graphs {task} {dtype} {law}",
                        lambda task=task, dtype=dtype, law=law: captured_against_eager(task, dtype, law, device, sizes),  # type: ignore[misc]
                        60,
                    )
                )
            steps.append(
                Step(
                    f"kernels {task} {law}",
                    lambda task=task, law=law: kernels_against_reference(task, law, device, sizes),  # type: ignore[misc]
                    60,
                )
            )
        for dtype in sizes.dtypes:
            for first in range(0, sizes.prompts, sizes.slice):
                last = min(first + sizes.slice, sizes.prompts)
                steps.append(
                    Step(
                        f"drafts {task} {dtype} {first}-{last}",
                        lambda task=task, dtype=dtype, first=first, last=last: drafts_against_per_step(  # type: ignore[misc]
                            task, dtype, first, last, device, sizes
                        ),
                        150,
                    )
                )
    return steps
