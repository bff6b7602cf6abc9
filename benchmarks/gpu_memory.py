"""Whether memory stays level: 10,000 tokens through one model, captures and caches kept from call to call.

A step of `benchmarks/gpu_suite.py`; on the CPU live tensors are counted.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.prompts import demo_prompts
from benchmarks.steps import Step
from specproxy import ProxyTunedModel, RowStreamer

__all__ = ["allocated_bytes", "level", "memory_steps"]

_SLACK = 2**20  # the allocator rounds


def allocated_bytes(device: torch.device) -> int:
    """Bytes of live tensors."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.device.type == device.type:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def level(
    device: torch.device, tokens: int, new_tokens: int, num_draft_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """Decode so many tokens in calls of `new_tokens`, and hold the bytes after each against those after the second."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = ProxyTunedModel.demo("arithmetic", device=str(device), dtype=dtype)
    ids = model.tokenizer(demo_prompts("arithmetic", 1)[0], return_tensors="pt").input_ids.to(device)
    done, after, within = 0, [], []

    def watch(row: int, block: list[int]) -> None:
        within.append(allocated_bytes(device))

    while done < tokens:
        output: Any = model.generate(
            ids,
            max_new_tokens=new_tokens,
            num_draft_tokens=num_draft_tokens,
            eos_token_id=[],
            seed=done,
            # One call in four is watched at every block: counting waits.
            streamer=RowStreamer(watch) if len(after) % 4 == 3 else None,
        )
        done += output.shape[1] - ids.shape[1]
        after.append(allocated_bytes(device))
    settled = after[min(1, len(after) - 1)]
    growth = max(after[1:], default=settled) - settled
    spread = max(within, default=0) - min(within, default=0)
    result = {"tokens": done, "calls": len(after), "bytes_after": after, "growth": growth, "within_a_call": spread}
    return result, [f"{growth} bytes more than after the second call"] if growth > _SLACK else []


def memory_steps(device: torch.device, tokens: int = 10_000, new_tokens: int = 500) -> list[Step]:
    """The steps of the part `memory`."""
    return [
        Step(f"{tokens} tokens, {count} drafts", lambda count=count: level(device, tokens, new_tokens, count), 240)  # type: ignore[misc]
        for count in (0, 4)
    ]
