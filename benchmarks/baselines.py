"""The loop that speculation must beat: plain proxy-tuning over Transformers' own cache, three forwards a token.

It knows torch and Transformers only, nothing of specproxy, so that a benchmark compares against code that a user would
write by hand. Prompts are left-padded; rows that have ended are padded until the last row ends.
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


class _Stepper:
    """One model with its cache, mask and positions: feed ids, get the logits of the last position."""

    def __init__(self, model: Any, attention_mask: torch.Tensor) -> None:
        self.model = model
        self.mask = attention_mask
        self.cache = DynamicCache(config=model.config)
        self.position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1
        return output.logits[:, -1]


def _chain(
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float | None,
    repetition_penalty: float,
    padding: torch.Tensor,
) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty, prompt_ignore_length=padding))
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


@torch.inference_mode()
def plain_loop_batched(
    models: Sequence[Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    alpha: float = 1.0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: Iterable[int] = (),
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    prompts: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Decode a left-padded batch by proxy-tuning without speculation.

    Args:
        models: base, expert, anti-expert, all on one device.
        input_ids: left-padded prompts, int64 [B, S].
        attention_mask: ones at the prompt's tokens, [B, S]; None where nothing is padded.
        max_new_tokens: tokens per row at most.
        alpha: strength of the pair.
        do_sample: draw from the warped law instead of taking its largest entry.
        temperature: divisor of the combined logits.
        top_k: size of the kept set, 0 for all.
        top_p: mass of the kept set.
        min_p: smallest kept probability, relative to the largest.
        repetition_penalty: penalty on ids in the prompt and the new tokens.
        eos_token_id: ids that end a row.
        pad_token_id: id that fills rows which have ended.
        generator: source of randomness for sampling; torch's own where None.
        prompts: `(input_ids, attention_mask)` of expert and anti-expert where they read prompts of their own.

    Returns:
        int64 [B, S + new]: the prompts as given, then the new tokens.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    pair = prompts or [(input_ids, attention_mask)] * 2
    steppers = [
        _Stepper(model, mask) for model, (_, mask) in zip(models, [(input_ids, attention_mask), *pair], strict=True)
    ]
    feed = [input_ids, pair[0][0], pair[1][0]]
    padding = (attention_mask != 0).int().argmax(dim=1)
    chain = _chain(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, padding)
    stop = torch.tensor(list(eos_token_id), dtype=torch.long, device=input_ids.device)
    open_rows = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    sequences = input_ids
    for _ in range(max_new_tokens):
        base, expert, anti_expert = (step(ids) for step, ids in zip(steppers, feed, strict=True))
        width = min(base.shape[-1], expert.shape[-1], anti_expert.shape[-1])
        dtype = torch.promote_types(base.dtype, torch.float32)
        base, expert, anti_expert = (logits[:, :width].to(dtype) for logits in (base, expert, anti_expert))
        scores = chain(sequences, base + alpha * (expert - anti_expert))
        if do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
        else:
            token = scores.argmax(-1)
        token = token.masked_fill(~open_rows, pad_token_id)
        sequences = torch.cat([sequences, token[:, None]], dim=1)
        open_rows &= ~torch.isin(token, stop)
        if len(stop) and not bool(open_rows.any()):
            break
        feed = [token[:, None]] * 3
    return sequences
