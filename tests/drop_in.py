"""What the tests of Transformers' arguments share: models, batches, cases, Transformers' own chain of processors."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from specproxy import ProxyTunedModel

PAD = 0
ROWS = tiny.prompts([7, 4, 6], seed=11)
#: Two end tokens at most would rarely be met: these are a quarter of all ids.
ENDS = [3, 9, 12, 20, 24, 26, 31, 33, 37, 38]


def batch(filler: int = PAD, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged prompts, left-padded: ids and mask."""
    return tiny.left_pad(ROWS, pad=filler, extra=extra)


@functools.cache
def model(alpha: float = 1.0) -> ProxyTunedModel:
    """The tiny trio at one strength."""
    return ProxyTunedModel(*tiny.shared_trio("llama").models, alpha=alpha)


def new_tokens(sequences: torch.Tensor, width: int = 7) -> list[list[int]]:
    """Generated columns as lists."""
    return [row[width:] for row in sequences.tolist()]


class Push(LogitsProcessor):
    """Pushes an id that depends on the last token and on the length of the prefix; keeps every prefix it was shown."""

    def __init__(self, strength: float = 6.0) -> None:
        self.strength, self.seen = strength, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert scores.shape == (1, tiny.VOCAB_SIZE)
        self.seen.append(tuple(input_ids[0].tolist()))
        pushed = scores.clone()
        pushed[:, (int(input_ids[0, -1]) * 7 + input_ids.shape[1]) % tiny.VOCAB_SIZE] += self.strength
        return pushed


def pushing(input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
    """Row by row, an id that depends on the last two tokens gains; a plain function serves as a processor."""
    pushed = scores.clone()
    for row, ids in enumerate(input_ids.tolist()):
        pushed[row, (ids[-1] * 3 + ids[-2]) % tiny.VOCAB_SIZE] += 5.0
    return pushed


def allowed(row: int, prefix: torch.Tensor) -> list[int]:
    """Six ids that depend on the row and its last token."""
    return [(int(prefix[-1]) * 3 + 5 * k + row) % tiny.VOCAB_SIZE for k in range(6)]


def stops_at_multiples(input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
    """A stopping criterion of the last token."""
    return (input_ids[:, -1] % 5 == 0).bool()


#: Greedy arguments, each of which changes what the plain call generates.
GREEDY: dict[str, dict[str, Any]] = {
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "suppress_tokens": [0, *range(6, 40)]},
    "bad_words_single": {"bad_words_ids": [[k] for k in range(14, 30)]},
    "bad_words_multi": {"bad_words_ids": [[3], *([a, b] for a in range(40) for b in range(10, 30))]},
    "suppress_tokens": {"suppress_tokens": list(range(10, 26))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 34))},
    "sequence_bias": {"sequence_bias": [[[8], 6.0], *([[k, 21], 7.0] for k in range(8, 20))]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": ENDS},
    "min_length": {"min_length": 13, "eos_token_id": ENDS},
    "min_both": {"min_length": 17, "min_new_tokens": 2, "eos_token_id": ENDS},
    "eos_list": {"eos_token_id": ENDS},
    "max_length": {"max_length": 14, "max_new_tokens": None},
    "forced_eos_token_id": {"forced_eos_token_id": 8},
    "forced_eos_list": {"forced_eos_token_id": [8, 9], "eos_token_id": [8, 9]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": 9},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": allowed},
    "logits_processor": {"logits_processor": LogitsProcessorList([pushing])},
    "stopping_criteria": {"stopping_criteria": [stops_at_multiples], "eos_token_id": 1},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "penalty_and_bans": {"repetition_penalty": 1.4, "suppress_tokens": [3, 4, 27], "min_new_tokens": 3},
    "penalty_and_python": {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3], [4, 5]],
        "begin_suppress_tokens": [8, 27],
        "eos_token_id": ENDS,
        "min_new_tokens": 4,
        "logits_processor": LogitsProcessorList([pushing]),
    },
    "prefix_and_bias": {"prefix_allowed_tokens_fn": allowed, "sequence_bias": {(7,): 4.0}, "repetition_penalty": 1.2},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.6},
    "remove_invalid_values": {"remove_invalid_values": True, "suppress_tokens": list(range(10, 26))},
}

#: Filters of a draw, alone and with what comes before them.
SAMPLED: dict[str, dict[str, Any]] = {
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "top_h": {"top_h": 0.5},
    "fused": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    "fused_penalty": {"temperature": 1.2, "top_k": 9, "repetition_penalty": 1.3},
    "all": {
        "temperature": 1.3,
        "top_h": 0.9,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.001,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 1e-3,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [3, 4],
        "renormalize_logits": True,
    },
    "renormalize_logits": {"temperature": 0.7, "top_k": 5, "renormalize_logits": True},
    "custom_processor": {"logits_processor": LogitsProcessorList([pushing]), "top_k": 8},
}


def arguments(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A case as arguments of `generate`: 12 new tokens unless it says otherwise."""
    merged = {"max_new_tokens": 12, "pad_token_id": PAD, **more, **case}
    return {name: value for name, value in merged.items() if value is not None}


def own_chain(case: dict[str, Any], prompt_length: int) -> LogitsProcessorList:
    """The processors that Transformers' `generate` would run when sampling these arguments."""
    taken = {name: value for name, value in case.items() if name != "logits_processor"}
    config = GenerationConfig(do_sample=True, **{"top_k": 50, **taken})
    config._eos_token_tensor = None
    base = tiny.shared_trio("llama").base
    own = case.get("logits_processor", LogitsProcessorList())
    return base._get_logits_processor(config, prompt_length, logits_processor=own, device="cpu", model_kwargs={})


def largest_gap(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], counts: list[int]) -> float:
    """Largest difference between two tuples of [B, V] over every row's own tokens; infinities must agree.

    The smallest float64 leaves float32's range, so that values beyond it count as infinite.
    """
    assert len(first) == len(second) == max(counts)
    gap = 0.0
    for t, (a, b) in enumerate(zip(first, second, strict=True)):
        live = [row for row, count in enumerate(counts) if t < count]
        a, b = (x[live].double().masked_fill(x[live] <= torch.finfo(torch.float32).min, -torch.inf) for x in (a, b))
        assert not a.isnan().any() and not b.isnan().any()
        same = a == b
        gap = max(gap, float((a - b).masked_fill(same, 0.0).abs().max()))
    return gap


def counts_of(rows: list[list[int]], ends: set[int]) -> list[int]:
    """Tokens of every row up to and with its first end token."""
    return [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]


@torch.no_grad()
def plain_loop(
    models: tuple[Any, ...],
    prompt: list[int],
    count: int,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alpha: float = 1.0,
) -> list[int]:
    """Greedy proxy-tuning of one unpadded row without a cache, every step's logits through `processor`."""
    tokens = list(prompt)
    for _ in range(count):
        ids = torch.tensor([tokens])
        last = [model(input_ids=ids, use_cache=False).logits[:, -1] for model in models]
        tokens.append(int(processor(ids, oracle.combine(*last, alpha)).argmax()))
    return tokens[len(prompt) :]


@contextmanager
def silent() -> Iterator[None]:
    """Transformers' advice about arguments is of no interest here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
