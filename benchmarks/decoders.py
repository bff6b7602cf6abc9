"""The ways of decoding that are compared, behind one signature: prompts in, new tokens out, the first one clocked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from benchmarks.baselines import plain_loop_batched
from benchmarks.measure import Stopwatch
from specproxy import ProxyTunedModel, SpeculationStats
from specproxy.attention import borrowed
from specproxy.config import SamplingParameters
from specproxy.decode import admit, evict_finished
from specproxy.processors import LawOptions, row_law
from specproxy.runner import Runner
from specproxy.state import BASE, DecodeState, Row
from specproxy.stats import TARGET
from specproxy.streaming import RowStreamer
from specproxy_kernels import row_keys, sample_drafts

__all__ = ["Decode", "Decoded", "Options", "make_decoders", "single_model_loop", "speculative"]


@dataclass(frozen=True)
class Options:
    """What all decoders share.

    Args:
        max_new_tokens: per row.
        do_sample, temperature, top_k: the law; filters as in Transformers.
        eos_token_ids: where rows end.
        pad_token_id: fills finished rows.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    eos_token_ids: frozenset[int]
    pad_token_id: int

    def law(self) -> dict[str, Any]:
        """Keyword arguments of the law, under Transformers' names."""
        if not self.do_sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}


@dataclass
class Decoded:
    """New tokens of every row, up to and with its end; and what speculation did, where it did."""

    tokens: list[list[int]]
    speculation: SpeculationStats | None = None


#: (input_ids [B, S], attention_mask [B, S], seed, stopwatch) -> Decoded
Decode = Callable[[Tensor, Tensor, int, Stopwatch], Decoded]


def make_decoders(
    model: ProxyTunedModel, options: Options, drafts: list[int | str], rules: list[str], batch_size: int
) -> dict[str, Decode]:
    """Decoders by name.

    Args:
        model: the trio.
        options: shared by all.
        drafts: numbers of drafts to speculate with, "auto" among them.
        rules: acceptance rules to speculate with; greedy decoding compares tokens under each of them.
        batch_size: rows per call; assisted decoding takes one row.

    Returns:
        `per_step`, `draft_G_RULE` for each number and rule, `plain_loop`, and `base_*` and `expert_*` alone: `_runtime`
        over this runtime's cache and attention, `_generate` with Transformers' generate, and `base_assisted`.
    """
    decoders: dict[str, Decode] = {"per_step": speculative(model, options, 0, "rejection")}
    for count in drafts:
        for rule in rules:
            decoders[f"draft_{count}_{rule}"] = speculative(model, options, count, rule)
    decoders["plain_loop"] = _plain(model, options)
    for role in ("base", "expert"):
        decoders[f"{role}_runtime"] = _alone(model, getattr(model, role), options)
        decoders[f"{role}_generate"] = _generate(model, getattr(model, role), options, {})
    widths = {m.get_output_embeddings().weight.shape[0] for m in (model.base, model.expert)}
    if batch_size == 1 and len(widths) == 1:  # Transformers asks for equal vocabularies
        decoders["base_assisted"] = _generate(model, model.base, options, {"assistant_model": model.expert})
    return decoders


def _cut(rows: list[list[int]], eos: frozenset[int]) -> list[list[int]]:
    """Rows up to and with their first end token."""
    ends = (next((i + 1 for i, token in enumerate(row) if token in eos), len(row)) for row in rows)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def speculative(
    model: ProxyTunedModel,
    options: Options,
    count: int | str,
    rule: str,
    drafter: str | None = None,
    num_tree_tokens: int = 0,
) -> Decode:
    """This runtime.

    Args:
        model: the trio.
        options: law, budget and ends.
        count, rule, drafter, num_tree_tokens: as in `SpeculationParameters`.
    """

    def decode(input_ids: Tensor, attention_mask: Tensor, seed: int, watch: Stopwatch) -> Decoded:
        output: Any = model.generate(
            input_ids,
            attention_mask,
            max_new_tokens=options.max_new_tokens,
            num_draft_tokens=count,  # type: ignore[arg-type]
            acceptance=rule,
            drafter=drafter,
            num_tree_tokens=num_tree_tokens,
            seed=seed,
            eos_token_id=list(options.eos_token_ids),
            pad_token_id=options.pad_token_id,
            streamer=RowStreamer(lambda row, tokens: watch.token()),
            return_dict_in_generate=True,
            **options.law(),
        )
        stats = output.speculation
        new = output.sequences[:, input_ids.shape[1] :].tolist()
        lengths = [len(sources) for sources in stats.token_sources]
        return Decoded([row[:length] for row, length in zip(new, lengths, strict=True)], stats)

    return decode


def _plain(model: ProxyTunedModel, options: Options) -> Decode:
    models = [model.base, model.expert, model.anti_expert]

    def decode(input_ids: Tensor, attention_mask: Tensor, seed: int, watch: Stopwatch) -> Decoded:
        # The loop has no streamer; the caller finds its first token by the clock of the forwards.
        output = plain_loop_batched(
            models,
            input_ids,
            attention_mask,
            max_new_tokens=options.max_new_tokens,
            alpha=model.alpha,
            eos_token_id=options.eos_token_ids,
            pad_token_id=options.pad_token_id,
            generator=torch.Generator(input_ids.device).manual_seed(seed),
            **options.law(),
        )
        return Decoded(_cut(output[:, input_ids.shape[1] :].tolist(), options.eos_token_ids))

    return decode


class _FirstToken:
    """A streamer of Transformers that clocks the first new token; the prompt comes before it."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.has_prompt = False

    def put(self, value: Tensor) -> None:
        if self.has_prompt:
            self.watch.token()
        self.has_prompt = True

    def end(self) -> None:
        pass


def _generate(model: ProxyTunedModel, alone: Any, options: Options, extra: dict[str, Any]) -> Decode:
    """Transformers' own generate on one model."""
    width = alone.get_output_embeddings().weight.shape[0]
    shared = model.vocab_size
    # An id that no model has stands for "never": None would bring back the model's own end tokens.
    eos = sorted(options.eos_token_ids) or [width]

    def mask(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, shared:] = -torch.inf
        return scores

    processors = LogitsProcessorList([mask] if width > shared else [])  # type: ignore[list-item]

    def decode(input_ids: Tensor, attention_mask: Tensor, seed: int, watch: Stopwatch) -> Decoded:
        torch.manual_seed(seed)
        output = alone.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=options.pad_token_id,
            logits_processor=processors,
            streamer=_FirstToken(watch),
            **options.law(),
            **extra,
        )
        return Decoded(_cut(output[:, input_ids.shape[1] :].tolist(), frozenset(eos)))

    return decode


def _alone(model: ProxyTunedModel, alone: Any, options: Options) -> Decode:
    def decode(input_ids: Tensor, attention_mask: Tensor, seed: int, watch: Stopwatch) -> Decoded:
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return Decoded(single_model_loop(alone, prompts, options, model._trio.vocabulary, seed, watch))

    return decode


@torch.inference_mode()
def single_model_loop(
    model: Any, prompts: list[list[int]], options: Options, vocabulary: Any, seed: int, watch: Stopwatch
) -> list[list[int]]:
    """One model over this runtime's cache, attention, sampling and eviction, without a pair and without drafts.

    Args:
        model: a Transformers causal language model.
        prompts: ids per row, unpadded.
        options: law, budget and ends.
        vocabulary: the `specproxy.vocab.SharedVocabulary` to draw from.
        seed: of the rows' noise.
        watch: told of every step.

    Returns:
        New tokens per row.
    """
    law = LawOptions(SamplingParameters(**options.law()))
    keys = row_keys([seed] * len(prompts), list(range(len(prompts)))).tolist()
    runner = Runner(model, BASE, len(prompts))
    rows = [
        Row(
            index=i,
            prompts={BASE: prompt},
            law=row_law(
                law,
                row_index=i,
                prompt_length=len(prompt),
                min_new_tokens=0,
                max_new_tokens=options.max_new_tokens,
                eos_token_ids=options.eos_token_ids,
                device=runner.device,
            ),
            alphas=(),
            key=keys[i],
            max_new_tokens=options.max_new_tokens,
            eos_token_ids=options.eos_token_ids,
        )
        for i, prompt in enumerate(prompts)
    ]
    state = DecodeState(len(rows), runner.device, vocabulary.size, vocabulary.allowed, "rejection", (BASE,))
    runner.cache.reserve(max(map(len, prompts)) + options.max_new_tokens + 1)
    runners: Any = [runner]
    with borrowed([model]):
        admit(state, runners, rows)
        while len(state):
            logits = runner.forward(state.pending[BASE][:, None])
            parameters, nothing = state.warp(1), torch.empty(len(state), 0, dtype=torch.long, device=runner.device)
            zero = torch.zeros(len(state), dtype=torch.long, device=runner.device)
            token, _ = sample_drafts(logits, parameters, nothing, state.noise(), state.vocab_size)
            tokens = token[:, 0].tolist()
            runner.cache.advance(state.commit(nothing, zero, token[:, 0]))
            runner.cache.follow([1] * len(tokens))
            for row, new in zip(state.rows, tokens, strict=True):
                row.append([new], [TARGET])
            watch.token()
            evict_finished(state, runners)
    return [row.tokens for row in rows]
