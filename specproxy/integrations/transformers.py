"""Proxy-tuning through Transformers' own `model.generate(..., custom_generate=...)`.

Transformers resolves its arguments before it calls us, and hands over less than it was given: a callable never sees
`streamer` and `tokenizer`, so both are arguments of `custom_generate` here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
)

from specproxy.errors import ConfigurationError
from specproxy.generate import GenerateOutput
from specproxy.model import ProxyTunedModel
from specproxy.options import parse_options
from specproxy.processors import Processor, configured_processors, configured_warpers
from specproxy.schedule import AlphaSchedule
from specproxy.suffix import LookupCorpus

__all__ = ["custom_generate"]


def custom_generate(
    expert: PreTrainedModel,
    anti_expert: PreTrainedModel | None = None,
    *,
    alpha: float = 1.0,
    alpha_schedule: AlphaSchedule | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    num_draft_tokens: int | Literal["auto"] = 4,
    num_tree_tokens: int = 0,
    acceptance: str = "rejection",
    drafter: str | None = None,
    corpus: LookupCorpus | None = None,
    assistant: PreTrainedModel | None = None,
) -> Callable[..., Tensor | GenerateOutput]:
    """A decoding method for `base.generate(..., custom_generate=...)`.

    Every argument of Transformers' `generate` keeps its meaning, the base's generation configuration included. `seed`,
    `alpha`, `alpha_schedule`, `num_draft_tokens`, `num_tree_tokens`, `acceptance`, `drafter`, `expert_input_ids`,
    `expert_attention_mask`, `anti_expert_input_ids` and `anti_expert_attention_mask` may be given to `generate` too.

    Args:
        expert, anti_expert: the pair, loaded Transformers causal language models; None for no anti-expert.
        alpha: proxy strength.
        alpha_schedule: how it changes over a row's new tokens.
        tokenizer: of the base; names the ids that may be generated, and is needed for stop strings.
        streamer: to stream to; Transformers does not pass on its own `streamer` argument to a callable.
        stop_strings: strings that end a row; Transformers refuses its own `stop_strings` argument beside a callable.
        num_draft_tokens, num_tree_tokens, acceptance, drafter, corpus: as in `ProxyTunedModel.generate`.
        assistant: a further model of the same vocabulary, for `drafter="assistant"`.

    Returns:
        The decoding method.

    Example:
        >>> method = custom_generate(expert, anti_expert, tokenizer=tokenizer)  # doctest: +SKIP
        >>> base.generate(**inputs, max_new_tokens=64, custom_generate=method)  # doctest: +SKIP
    """
    proxies: dict[int, ProxyTunedModel] = {}
    pair_alpha, pair_schedule, pair_count, pair_rule = alpha, alpha_schedule, num_draft_tokens, acceptance
    pair_drafter, pair_nodes = drafter, num_tree_tokens

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Processor],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        alpha: float | Sequence[float] | None = None,
        alpha_schedule: AlphaSchedule | Sequence[AlphaSchedule | None] | None = None,
        num_draft_tokens: int | Literal["auto"] | None = None,
        num_tree_tokens: int | None = None,
        acceptance: str | None = None,
        drafter: str | None = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        anti_expert_input_ids: Tensor | None = None,
        anti_expert_attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateOutput:
        # Not named above: Transformers hands over twice what a callable names and a model takes too.
        attention_mask, past_key_values = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ConfigurationError(
                "past_key_values holds tokens: every call builds its own caches; give the whole prompt."
            )
        proxy = proxies.get(id(model))
        if proxy is None:
            models = (model, expert, anti_expert)
            proxy = proxies[id(model)] = ProxyTunedModel(*models, tokenizer, pair_alpha, assistant=assistant)
        custom, allowed = _own_processors(logits_processor, generation_config, input_ids.shape[1])
        criteria = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        # Transformers has made criteria and copies of rows of these already.
        config = _changed(generation_config, max_time=None, num_return_sequences=1, max_new_tokens=None)
        config.eos_token_id, config.pad_token_id = _resolved_ids(generation_config)
        output = proxy.generate(
            input_ids,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            generation_config=config,
            return_dict_in_generate=True,
            logits_processor=custom,
            stopping_criteria=criteria,
            prefix_allowed_tokens_fn=allowed,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            streamer=streamer,
            seed=seed,
            generator=generator,
            alpha=alpha,
            alpha_schedule=pair_schedule if alpha_schedule is None else alpha_schedule,
            num_draft_tokens=pair_count if num_draft_tokens is None else num_draft_tokens,
            num_tree_tokens=pair_nodes if num_tree_tokens is None else num_tree_tokens,
            acceptance=acceptance or pair_rule,
            drafter=drafter or pair_drafter,
            corpus=corpus,
            expert_input_ids=expert_input_ids,
            expert_attention_mask=expert_attention_mask,
            anti_expert_input_ids=anti_expert_input_ids,
            anti_expert_attention_mask=anti_expert_attention_mask,
        )
        assert isinstance(output, GenerateOutput)
        return output if generation_config.return_dict_in_generate else output.sequences

    return decode


def _resolved_ids(config: GenerationConfig) -> tuple[Any, Any]:
    """End and pad ids after Transformers has resolved them."""
    eos, pad = config.eos_token_id, config.pad_token_id
    if pad is None and eos is not None:
        pad = eos if isinstance(eos, int) else eos[0]
    return eos, pad


def _own_processors(
    prepared: Sequence[Processor], config: GenerationConfig, prompt_length: int
) -> tuple[list[Processor], Callable[[int, Tensor], list[int]] | None]:
    """The caller's processors among those that Transformers has prepared, and its prefix function.

    What Transformers made from its configuration is made anew here, row by row; it is told from the caller's own
    objects by type and parameters.
    """
    options = parse_options({}, _changed(config, num_return_sequences=1, stop_strings=None), 0, "rejection", None)
    eos, _ = _resolved_ids(config)
    expected = configured_processors(
        options.law,
        row_index=0,
        prompt_length=prompt_length,
        min_new_tokens=options.min_new_tokens or 0,
        max_new_tokens=options.budget(prompt_length)[1],
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
        device=torch.device("cpu"),
    )
    if options.min_length:
        expected.append(MinLengthLogitsProcessor(options.min_length, eos or 0))
    expected += configured_warpers(options.law)
    own: list[Processor] = []
    allowed = None
    for processor in prepared:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            continue
        twin = next((e for e in expected if _alike(e, processor)), None)
        if twin is None:
            own.append(processor)
        else:
            expected.remove(twin)
    return own, allowed


def _changed(config: GenerationConfig, **changes: Any) -> GenerationConfig:
    """A copy; not through dictionaries, since Transformers has put tensors into its configuration."""
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _alike(a: Any, b: Any) -> bool:
    simple = (int, float, str, bool)
    return type(a) is type(b) and all(
        vars(b).get(name) == value for name, value in vars(a).items() if isinstance(value, simple)
    )
