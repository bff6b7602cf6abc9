"""The arguments of Transformers' `generate`: which are taken, what they default to, and what the others are told.

A value comes from the call, else from a `GenerationConfig` given to it, else it is Transformers' default. The models'
own configurations are asked for end and pad ids alone. Knows nothing of models or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from specproxy.config import SamplingParameters, SpeculationParameters, check_integer, check_number
from specproxy.errors import ConfigurationError
from specproxy.processors import LawOptions

__all__ = ["GenerationOptions", "parse_options"]

_LAW = (
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "renormalize_logits",
)
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_LENGTH = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings")
_OUTPUT = ("num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate")
_FLAGS = ("output_scores", "output_logits", "return_dict_in_generate", "remove_invalid_values", "renormalize_logits")
_IDS = ("eos_token_id", "pad_token_id")
_CALLABLES = ("prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria", "tokenizer", "grammar")
_FROM_CONFIG = (*_LAW, *_SAMPLING, *_LENGTH, *_OUTPUT, *_IDS)

# What cannot be had, with the alternative; a value in the second place is harmless and passes.
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "num_beams": (
        "beam search is not supported; use greedy decoding, or num_return_sequences with do_sample=True",
        (1,),
    ),
    "num_beam_groups": ("beam search is not supported; use greedy decoding or sampling", (1,)),
    "diversity_penalty": ("beam search is not supported; use greedy decoding or sampling", (0, 0.0)),
    "length_penalty": ("beam search is not supported; use exponential_decay_length_penalty", (1, 1.0)),
    "early_stopping": ("beam search is not supported; use stopping_criteria", (False,)),
    "constraints": ("constrained beam search is not supported; use prefix_allowed_tokens_fn", ()),
    "force_words_ids": ("constrained beam search is not supported; use prefix_allowed_tokens_fn", ()),
    "penalty_alpha": ("contrastive search is not supported; use sampling with repetition_penalty", ()),
    "dola_layers": ("DoLa decoding is not supported; it needs hidden states of every layer", ()),
    "guidance_scale": ("classifier-free guidance is not supported; alpha steers by the expert instead", (1, 1.0)),
    "negative_prompt_ids": ("classifier-free guidance is not supported; alpha steers by the expert instead", ()),
    "watermarking_config": ("watermarking is not supported; pass a pure LogitsProcessor instead", ()),
    "encoder_repetition_penalty": ("there is no encoder here; use repetition_penalty", (1, 1.0)),
    "encoder_no_repeat_ngram_size": ("there is no encoder here; use no_repeat_ngram_size", (0,)),
    "token_healing": ("token healing is not supported; end the prompt on a token boundary", (False,)),
    "assistant_model": ('construct the model with assistant=... and use drafter="assistant" with num_draft_tokens', ()),
    "prompt_lookup_num_tokens": ('use drafter="lookup" with num_draft_tokens', ()),
    "assistant_early_exit": ("the expert drafts; use num_draft_tokens", ()),
    "past_key_values": ("every call builds its own ragged caches; give the whole prompt", ()),
    "inputs_embeds": ("drafting needs token ids; use input_ids", ()),
    "use_cache": ("every call builds its own ragged caches; leave it out", (True,)),
    "cache_implementation": ("every call builds its own ragged caches; leave it out", ("dynamic",)),
    "output_attentions": (
        "attention weights are not kept under window attention; call forward() of the model",
        (False,),
    ),
    "output_hidden_states": ("hidden states are not kept; call forward() of the model", (False,)),
    "low_memory": ("it belongs to searches that are not supported; leave it out", (False,)),
    "synced_gpus": ("sharded generation in step is not supported; leave it out", (False,)),
    "use_model_defaults": ("the models' sampling defaults are never used; pass a generation_config", (False,)),
}


@dataclass(frozen=True)
class GenerationOptions:
    """The checked arguments of one call, but for prompts, seeds and speculation; lengths are still those asked for."""

    law: LawOptions
    speculation: SpeculationParameters
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    max_time: float | None = None
    stop_strings: list[str] | None = None
    tokenizer: Any = None
    stopping_criteria: tuple[Any, ...] = ()
    num_return_sequences: int = 1
    eos_token_id: Any = None
    pad_token_id: int | None = None
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False

    def budget(self, prompt_length: int) -> tuple[int, int]:
        """New tokens at least and at most, behind a prompt of `prompt_length` tokens, padding included.

        Raises:
            ConfigurationError: where max_length leaves no token.
        """
        if self.max_new_tokens is not None:
            most = self.max_new_tokens
        elif self.max_length is not None:
            most = self.max_length - prompt_length
            if most < 1:
                raise ConfigurationError(
                    f"max_length={self.max_length} leaves no new token behind a prompt of {prompt_length} tokens; "
                    "use max_new_tokens."
                )
        else:
            most = 20
        # As in Transformers, min_new_tokens takes precedence.
        least = self.min_length - prompt_length if self.min_new_tokens is None else self.min_new_tokens
        return max(least, 0), most


def parse_options(
    given: dict[str, Any],
    generation_config: GenerationConfig | None,
    num_draft_tokens: Any,
    acceptance: str,
    default_tokenizer: Any,
    cuda_graphs: bool | None = None,
    num_tree_tokens: int = 0,
    drafter: str | None = None,
) -> GenerationOptions:
    """Check the arguments of a call.

    Args:
        given: keyword arguments under Transformers' names; None counts as not given.
        generation_config: supplies what was not given.
        num_draft_tokens, acceptance, cuda_graphs, num_tree_tokens, drafter: speculation, as in
            `SpeculationParameters`.
        default_tokenizer: for stop strings, where the call gives none.

    Raises:
        ConfigurationError: for an unknown or unsupported argument, or an unusable value.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if generation_config is not None:
        if not isinstance(generation_config, GenerationConfig):
            kind = type(generation_config).__name__
            raise ConfigurationError(f"generation_config is a {kind}; give a transformers.GenerationConfig.")
        configured = {name: value for name, value in generation_config.to_dict().items() if value is not None}
        for name in (*_FROM_CONFIG, *_REFUSED):
            if name in configured:
                values.setdefault(name, configured[name])
    _refuse(values)
    values = {name: value for name, value in values.items() if name not in _REFUSED}
    sampling = SamplingParameters(**{name: values[name] for name in _SAMPLING if name in values})
    stop_strings = values.get("stop_strings")
    tokenizer = values.get("tokenizer", default_tokenizer)
    if stop_strings is not None:
        stop_strings = list(stop_strings) if isinstance(stop_strings, (list, tuple, set)) else [stop_strings]
        if not stop_strings or not all(isinstance(stop, str) and stop for stop in stop_strings):
            raise ConfigurationError(f"stop_strings={stop_strings!r} must be a string or a list of non-empty strings.")
        if tokenizer is None:
            raise ConfigurationError(f"stop_strings={stop_strings!r} need a tokenizer; pass tokenizer=...")
    max_time = values.get("max_time")
    if max_time is not None and check_number("max_time", max_time) <= 0:
        raise ConfigurationError(f"max_time={max_time!r} must be above 0 seconds.")
    most = values.get("max_new_tokens")
    if most is not None:
        check_integer("max_new_tokens", most, 1, "ask for at least one token")
    count = check_integer("num_return_sequences", values.get("num_return_sequences", 1), 1, "ask for at least one")
    if count > 1 and not sampling.do_sample:
        raise ConfigurationError(
            f"num_return_sequences={count} greedy sequences would all be equal; set do_sample=True."
        )
    for name in ("max_length", "min_length", "min_new_tokens"):
        if name in values:
            check_integer(name, values[name], 0, "give a number of tokens")
    if most is not None and values.get("min_new_tokens", 0) > most:
        raise ConfigurationError(f"min_new_tokens={values['min_new_tokens']} exceeds max_new_tokens={most}.")
    for name in _FLAGS:
        if not isinstance(values.get(name, False), bool):
            raise ConfigurationError(f"{name}={values[name]!r} must be True or False.")
    criteria = _listed(values.get("stopping_criteria"))
    for criterion in criteria:
        if not callable(criterion):
            raise ConfigurationError(f"stopping_criteria holds {criterion!r}; give callables of (input_ids, scores).")
    speculation = SpeculationParameters(num_draft_tokens, acceptance, cuda_graphs, num_tree_tokens, drafter)
    speculation.check_rule(sampling.do_sample)
    law = LawOptions(
        sampling,
        **{name: values[name] for name in _LAW if name in values},
        prefix_allowed_tokens_fn=values.get("prefix_allowed_tokens_fn"),
        logits_processor=_listed(values.get("logits_processor")),
        grammar=values.get("grammar"),
    )
    return GenerationOptions(
        law=law,
        speculation=speculation,
        max_new_tokens=most,
        max_length=values.get("max_length"),
        min_new_tokens=values.get("min_new_tokens"),
        min_length=values.get("min_length", 0),
        max_time=max_time,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        stopping_criteria=criteria,
        num_return_sequences=count,
        eos_token_id=values.get("eos_token_id"),
        pad_token_id=values.get("pad_token_id"),
        output_scores=bool(values.get("output_scores", False)),
        output_logits=bool(values.get("output_logits", False)),
        return_dict_in_generate=bool(values.get("return_dict_in_generate", False)),
    )


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _refuse(values: dict[str, Any]) -> None:
    known = {*_FROM_CONFIG, *_CALLABLES}
    for name, value in values.items():
        if name in known:
            continue
        if name not in _REFUSED:
            raise ConfigurationError(f"{name}={value!r} is not an argument of generate(); remove it.")
        reason, harmless = _REFUSED[name]
        if not any(isinstance(value, type(other)) and value == other for other in harmless):
            raise ConfigurationError(f"{name}={value!r}: {reason}.")
