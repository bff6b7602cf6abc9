"""Tiny random trios whose joint law of tokens can be enumerated, and samples of it through `ProxyTunedModel.generate`.

The exact law comes from plain forwards over every prefix and the NumPy reference; it shares no code with the package.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import chi_square
import numpy as np
import torch
import transformers
from numpy_reference import combine, warp

#: Two prompts of unequal length share every batch, so that rows are ragged from the start.
PROMPTS = ((4, 1, 2), (0,))
WIDTHS = (8, 7, 7)  # logits of base, expert and anti-expert; the tokenizer knows fewer ids


class Words:
    """The one property of a tokenizer that the package reads: its ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._vocab = {f"w{i}": i for i in ids}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


@dataclass(frozen=True)
class LoopCase:
    """One rule, window and sampling setting.

    Args:
        settings: arguments of `generate`, named as there.
        ids: what the tokenizer knows; the other ids of the models are padding.
        correlation: the expert is the base with its output layer times this: negative values oppose draft and target.
        shares: what is left of alpha at each token, where the settings make it change.
        length: tokens whose joint law is compared; generation goes on for `extra` more, so that windows cross its end.
        drafting: further arguments of `generate`, which change no law.
    """

    rule: str
    num_drafts: int
    settings: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = (0, 1, 2, 3, 4)
    correlation: float = -0.5
    length: int = 3
    extra: int = 0
    alpha: float = 1.0
    seed: int = 0
    shares: tuple[float, ...] | None = None
    drafting: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.rule}-G{self.num_drafts}", *(f"{name}={value}" for name, value in self.settings.items())]
        parts += [str(value) for value in self.drafting.values() if isinstance(value, str)]
        if self.ids[-1] + 1 != len(self.ids):
            parts.append("hole")
        return "-".join(parts)


def _llama(width: int, seed: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=width,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.25 if "lm_head" in name else 0.5)
    model.generation_config = transformers.GenerationConfig()
    return model


@functools.cache
def models(correlation: float, seed: int) -> tuple[Any, Any, Any]:
    """Base, expert and anti-expert; their padding ids score high, so that an open one would be drawn at once."""
    base, expert, anti_expert = (_llama(width, 100 * seed + i) for i, width in enumerate(WIDTHS))
    known = copy.deepcopy(dict(base.named_parameters()))
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            rows = min(len(parameter), len(known[name]))
            parameter[:rows] = known[name][:rows]
        expert.lm_head.weight.mul_(correlation)
        anti_expert.lm_head.weight.mul_(0.5)
        for model in (base, expert):
            model.lm_head.weight[5:] *= 3
    return base, expert, anti_expert


def exact_law(case: LoopCase, prompt: Sequence[int]) -> np.ndarray:
    """Joint law [V] * length of the new tokens after one prompt, V = largest known id + 1."""
    trio = models(case.correlation, case.seed)
    vocab = case.ids[-1] + 1
    allowed = np.isin(np.arange(vocab), case.ids)
    arguments = {name: value for name, value in case.settings.items() if name not in ("top_k", "alpha_schedule")}
    law = np.ones(())
    for depth in range(case.length):
        alpha = case.alpha * (1.0 if case.shares is None else case.shares[depth])
        prefixes = list(itertools.product(range(vocab), repeat=depth))
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.no_grad():
            scores = [model(input_ids=ids, use_cache=False).logits[:, -1].double().numpy() for model in trio]
        step = np.empty((vocab,) * (depth + 1))
        for row, prefix in enumerate(prefixes):
            base, expert, anti_expert = (part[row] for part in scores)
            combined, bad = combine(base, [(expert, anti_expert, alpha)], vocab)
            assert not bad
            seen = {*prompt, *prefix} if "repetition_penalty" in arguments else ()
            warped = warp(
                combined,
                **arguments,
                top_k=case.settings.get("top_k", 0),
                seen=seen,
                output=prefix,
                allowed=allowed,
            )
            step[prefix] = warped.prob
        law = law[..., None] * step
    return law


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Both prompts, left-padded with an ordinary id."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[3] * (width - len(prompt)) + list(prompt) for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return ids, mask


def sample(
    model_class: Callable[..., Any], case: LoopCase, rows: int, seed: int, batch: int = 4096
) -> list[np.ndarray]:
    """New tokens [rows, length] after each prompt: `rows` draws per prompt, both prompts in every batch."""
    model = model_class(*models(case.correlation, case.seed), tokenizer=Words(case.ids), alpha=case.alpha)
    ids, mask = padded_prompts()
    width = ids.shape[1]
    found = []
    for part in range(0, rows, batch // 2):
        count = min(batch // 2, rows - part)
        tokens = model.generate(
            ids.repeat(count, 1),
            mask.repeat(count, 1),
            max_new_tokens=case.length + case.extra,
            do_sample=True,
            num_draft_tokens=case.num_drafts,
            acceptance=case.rule,
            seed=1000 * seed + part,
            **{"top_k": 0, **case.settings, **case.drafting},
        )
        found.append(tokens[:, width : width + case.length].view(count, len(PROMPTS), case.length).numpy())
    drawn = np.concatenate(found)
    return [drawn[:, i] for i in range(len(PROMPTS))]


def smallest_p_value(model_class: Callable[..., Any], case: LoopCase, rows: int, seed: int) -> float:
    """Smallest p value over the prompts; 0 where an id outside the law's support was drawn."""
    smallest = 1.0
    for prompt, tokens in zip(PROMPTS, sample(model_class, case, rows, seed), strict=True):
        law = exact_law(case, prompt)
        if tokens.max() >= law.shape[0]:
            return 0.0
        smallest = min(smallest, chi_square.p_value(tokens, law))
    return smallest


def greedy_path(case: LoopCase, length: int) -> list[list[int]]:
    """Argmax tokens after each prompt, by plain forwards over the whole text."""
    found = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                ids = torch.tensor([tokens])
                scores = [
                    model(input_ids=ids, use_cache=False).logits[0, -1].double().numpy()
                    for model in models(case.correlation, case.seed)
                ]
            combined, _ = combine(scores[0], [(scores[1], scores[2], case.alpha)], case.ids[-1] + 1)
            tokens.append(max(case.ids, key=lambda i: combined[i]))
        found.append(tokens[len(prompt) :])
    return found


def greedy_tokens(model_class: Callable[..., Any], case: LoopCase, length: int) -> list[list[int]]:
    """The same through `generate`, both prompts in one batch."""
    model = model_class(*models(case.correlation, case.seed), tokenizer=Words(case.ids), alpha=case.alpha)
    ids, mask = padded_prompts()
    tokens = model.generate(ids, mask, max_new_tokens=length, num_draft_tokens=case.num_drafts)
    return [list(row) for row in tokens[:, ids.shape[1] :].tolist()]
