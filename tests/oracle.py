"""Proxy-tuning written a second time, as plainly as possible, to compare the package with.

It imports torch and Transformers only. One row at a time, never padded, one token at a time, a fresh Transformers cache
per model: there is no padding, no window, no rollback and no batch that could be wrong. `recompute_greedy` goes without
a cache as well and checks the cached loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

Prompt = Sequence[int]


def combine(base: torch.Tensor, expert: torch.Tensor, anti_expert: torch.Tensor, alpha: float) -> torch.Tensor:
    """base + alpha * (expert - anti_expert) over the ids that all three have, in float32 or wider."""
    width = min(base.shape[-1], expert.shape[-1], anti_expert.shape[-1])
    dtype = torch.promote_types(torch.promote_types(base.dtype, expert.dtype), torch.float32)
    b, e, a = (logits[..., :width].to(dtype) for logits in (base, expert, anti_expert))
    return b + alpha * (e - a)


def processors(
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> LogitsProcessorList:
    """Transformers' own processors in the order in which its `generate` applies them."""
    chain = LogitsProcessorList()
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if do_sample:
        if temperature != 1.0:
            chain.append(TemperatureLogitsWarper(temperature))
        if top_k:
            chain.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            chain.append(TopPLogitsWarper(top_p))
        if min_p is not None:
            chain.append(MinPLogitsWarper(min_p))
    return chain


@torch.no_grad()
def plain_greedy(
    models: Sequence[Any],
    prompt: Prompt,
    *,
    max_new_tokens: int,
    expert_prompt: Prompt | None = None,
    anti_expert_prompt: Prompt | None = None,
    alpha: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: Iterable[int] = (),
    margins: list[float] | None = None,
) -> list[int]:
    """New tokens of greedy proxy-tuning for one prompt, its end-of-text token included.

    Args:
        models: base, expert, anti-expert.
        prompt: ids that the base reads, and the pair too where it has no prompt of its own.
        max_new_tokens: how many tokens at most.
        expert_prompt: ids that the expert reads.
        anti_expert_prompt: ids that the anti-expert reads.
        alpha: strength of the pair.
        repetition_penalty: on the combined logits, over the base's prompt and the new tokens.
        eos_token_id: ids that end the text.
        margins: receives the distance between best and second-best score of each step.
    """
    chain = processors(repetition_penalty=repetition_penalty)
    stop = set(eos_token_id)
    pending = [list(prompt), list(expert_prompt or prompt), list(anti_expert_prompt or prompt)]
    caches = [DynamicCache(config=model.config) for model in models]
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        last = []
        for model, ids, cache in zip(models, pending, caches, strict=True):
            output = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            last.append(output.logits[:, -1])
        scores = combine(*last, alpha)
        scores = chain(torch.tensor([[*prompt, *tokens]]), scores)
        if margins is not None:
            best = scores[0].topk(2).values
            margins.append(float(best[0] - best[1]))
        token = int(scores[0].argmax())
        tokens.append(token)
        if token in stop:
            break
        pending = [[token]] * 3
    return tokens


@torch.no_grad()
def recompute_greedy(
    models: Sequence[Any],
    prompt: Prompt,
    *,
    max_new_tokens: int,
    expert_prompt: Prompt | None = None,
    anti_expert_prompt: Prompt | None = None,
    alpha: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: Iterable[int] = (),
) -> list[int]:
    """The same as `plain_greedy` without any cache: every step reads the whole text again."""
    tokens: list[int] = []
    for _ in range(max_new_tokens):
        scores = _scores(models, prompt, expert_prompt, anti_expert_prompt, tokens, alpha)
        scores = processors(repetition_penalty=repetition_penalty)(torch.tensor([[*prompt, *tokens]]), scores)
        tokens.append(int(scores[0].argmax()))
        if tokens[-1] in set(eos_token_id):
            break
    return tokens


@torch.no_grad()
def target_law(
    models: Sequence[Any],
    prompt: Prompt,
    tokens: Sequence[int] = (),
    *,
    expert_prompt: Prompt | None = None,
    anti_expert_prompt: Prompt | None = None,
    alpha: float = 1.0,
    **sampling: Any,
) -> torch.Tensor:
    """The law of the next token after `prompt` and the new `tokens`: float64 probabilities [V].

    `sampling` are the arguments of `processors` other than `do_sample`.
    """
    scores = _scores(models, prompt, expert_prompt, anti_expert_prompt, tokens, alpha).double()
    chain = processors(do_sample=True, **sampling)
    return chain(torch.tensor([[*prompt, *tokens]]), scores).softmax(-1)[0]


def _scores(
    models: Sequence[Any],
    prompt: Prompt,
    expert_prompt: Prompt | None,
    anti_expert_prompt: Prompt | None,
    tokens: Sequence[int],
    alpha: float,
) -> torch.Tensor:
    own = [prompt, expert_prompt or prompt, anti_expert_prompt or prompt]
    last = [
        model(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits[:, -1]
        for model, ids in zip(models, own, strict=True)
    ]
    return combine(*last, alpha)


def cut(tokens: Sequence[int], max_new_tokens: int, eos_token_id: Iterable[int] = ()) -> list[int]:
    """A long greedy continuation as it reads under a smaller budget or with more end-of-text ids."""
    stop = set(eos_token_id)
    kept: list[int] = []
    for token in tokens[:max_new_tokens]:
        kept.append(token)
        if token in stop:
            break
    return kept


def expected_output(input_ids: torch.Tensor, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """What `generate` must return for these new tokens per row: prompt as given, then tokens, then padding."""
    width = max(len(row) for row in rows)
    new = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)
    return torch.cat([input_ids, new], dim=1)
