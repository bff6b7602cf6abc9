"""What acceptance rules give beside each other: tokens a cycle on the same prompts and seeds, `coupled` beside 1 - TV.

Reads no clock.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import Run
from specproxy import ProxyTunedModel
from specproxy_kernels import gumbel_noise, row_keys
from specproxy_kernels.noise import PURPOSE_TOKEN

__all__ = ["coupled_bound", "tokens_a_cycle_ratio"]


def tokens_a_cycle_ratio(over: list[Run], under: list[Run]) -> dict[str, float]:
    """Tokens a cycle of one way of decoding over those of another, on the same prompts and seeds.

    Args:
        over, under: paired runs of paired calls.

    Returns:
        `over` and `under`, tokens a cycle of all calls; `ratio`; `standard_error` of the ratio between pairs of calls
        by linearisation (0 for a single pair).
    """
    pairs = [
        (a.num_new_tokens, a.num_cycles, b.num_new_tokens, b.num_cycles)
        for mine, theirs in zip(over, under, strict=True)
        for a, b in zip(mine.speculation, theirs.speculation, strict=True)
    ]
    tokens, cycles, other_tokens, other_cycles = (sum(column) for column in zip(*pairs, strict=True))
    first, second = tokens / cycles, other_tokens / other_cycles
    # The ratio moves by what each pair's tokens exceed those that its cycles would give at the means.
    shifts = [(a - first * b) / tokens - (c - second * d) / other_tokens for a, b, c, d in pairs]
    count = len(shifts)
    spread = math.sqrt(sum(shift * shift for shift in shifts) * count / (count - 1)) if count > 1 else 0.0
    return {"over": first, "under": second, "ratio": first / second, "standard_error": first / second * spread}


@torch.inference_mode()
def coupled_bound(model: ProxyTunedModel, prompts: list[list[int]], count: int, temperature: float) -> dict[str, Any]:
    """How often the expert's draft is the target's token under shared noise, beside what the laws allow.

    The positions are all those of per-step texts under `coupled`, whose tokens are the target's by the same noise: at
    each one, draft and target stand behind the same prefix.

    Args:
        model: the trio.
        prompts: ids; each is decoded by itself, its place being its seed.
        count: tokens of a text, end tokens notwithstanding.
        temperature: of both laws, which have no filters.

    Returns:
        `positions`; `coupled`, the share of equal tokens; means of `one_minus_tv`, which `rejection` reaches in
        expectation, and of `bound`, (1 - TV) / (1 + TV), which `coupled` does not fall short of in expectation
        (Daliri et al. 2024, arXiv 2408.07978).
    """
    equal: list[Tensor] = []
    distances: list[Tensor] = []
    for place, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=model.device)
        law = {"do_sample": True, "temperature": temperature, "top_k": 0, "acceptance": "coupled"}
        whole = model.generate(ids, max_new_tokens=count, num_draft_tokens=0, seed=[place], eos_token_id=[], **law)
        rows = slice(len(prompt) - 1, -1)
        target = model(whole).logits[0, rows].double().cpu() / temperature
        draft = model.expert(input_ids=whole).logits[0, rows, : model.vocab_size].double().cpu() / temperature
        draft = draft.masked_fill(target.isinf(), -torch.inf)  # ids that are not shared
        distances.append((target.softmax(-1) - draft.softmax(-1)).abs().sum(-1) / 2)
        index = torch.arange(len(draft))[None]
        noise = gumbel_noise(row_keys([place], [0]), index, PURPOSE_TOKEN, model.vocab_size)[0]
        equal.append((draft + noise).argmax(-1) == whole[0, len(prompt) :].cpu())
    tv = torch.cat(distances)
    return {
        "positions": len(tv),
        "coupled": torch.cat(equal).double().mean().item(),
        "one_minus_tv": (1 - tv).mean().item(),
        "bound": ((1 - tv) / (1 + tv)).mean().item(),
    }
