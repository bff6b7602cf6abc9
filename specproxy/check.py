"""Whether the models fit together, what they take and what to expect: from configurations alone, without loading
weights.

`self_test` then runs a loaded trio: speculation against per-step decoding, token by token, and a timing.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specproxy.adapters import (
    LoraSwitch,
    adapter_base,
    is_adapted,
    is_adapter,
    refuse_adapter,
    shape_adapter,
    without_adapter,
)
from specproxy.errors import SpecProxyError, UnsupportedModelError
from specproxy.generate import GenerateOutput
from specproxy.model import ProxyTunedModel
from specproxy.pretrained import load_tokenizers
from specproxy.runner import check_supported, logits_width, position_limit
from specproxy.state import ANTI_EXPERT, ASSISTANT, BASE, EXPERT
from specproxy.theory import best_num_draft_tokens, speedup_over_base, speedup_over_per_step
from specproxy.vocab import check_drafts_vocabulary, share_vocabulary

__all__ = ["CheckReport", "SelfTest", "check_folders", "model_without_weights", "self_test"]

_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_ACCEPTANCE_LEVELS = (0.6, 0.7, 0.8, 0.9)


@dataclass
class ModelFacts:
    """One model, from its configuration.

    Args:
        architecture: class name.
        num_parameters: all that a forward reads, shared ones once.
        weight_bytes: per dtype.
        kv_bytes_per_token: of the cache in a 2-byte dtype; 0 without attention.
        vocab_width: of its logits.
        max_positions: or None.
        has_tokenizer: whether one was found beside it.
        shares_weights: whether it is an adapter on the anti-expert, of which `weight_bytes` then counts the adapter.
    """

    architecture: str
    num_parameters: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: int
    vocab_width: int
    max_positions: int | None
    has_tokenizer: bool
    shares_weights: bool = False


@dataclass
class CheckReport:
    """What `check_folders` found.

    Args:
        models: facts per role, as far as they could be read.
        problems: why they cannot run together; empty where they can.
        notes: what to know beside.
        shared_vocabulary: ids that may be generated, or None.
        cost_ratio: parameters of the expert over those of the base: the ratio of their times where both are bound by
            memory.
        expectations: per acceptance level, the best number of drafts and the expected ratio to per-step and to the
            base alone.
    """

    models: dict[str, ModelFacts] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared_vocabulary: int | None = None
    cost_ratio: float | None = None
    expectations: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass
class SelfTest:
    """What `self_test` measured.

    Args:
        tokens_equal: greedy tokens that speculation and per-step decoding have in common before the first difference.
        tokens_compared: tokens of the comparison.
        coupled_equal, coupled_compared: likewise, sampling under the coupled rule with one seed.
        acceptance_rate: of the greedy run.
        speedup_over_per_step: median of paired runs.
    """

    tokens_equal: int
    tokens_compared: int
    coupled_equal: int
    coupled_compared: int
    acceptance_rate: float
    speedup_over_per_step: float

    @property
    def is_lossless(self) -> bool:
        """Whether every token was the same."""
        return self.tokens_equal == self.tokens_compared and self.coupled_equal == self.coupled_compared

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"is_lossless": self.is_lossless}


def check_folders(
    base: str,
    expert: str,
    anti_expert: str | None = None,
    tokenizer: str | None = None,
    assistant: str | None = None,
) -> CheckReport:
    """Read configurations and tokenizers of the models' folders or hub ids.

    Args:
        base, expert, anti_expert: folders or hub ids; None for no anti-expert.
        tokenizer: of the base, where it lies elsewhere.
        assistant: likewise, a model that drafts; None for none.

    Raises:
        OSError: Transformers' own, for a configuration or tokenizer that cannot be read.
    """
    report = CheckReport()
    widths: dict[str, int] = {}
    given = {BASE: base, EXPERT: expert, ANTI_EXPERT: anti_expert, ASSISTANT: assistant}
    names = {role: name for role, name in given.items() if name is not None}
    tokenizers = load_tokenizers(names, tokenizer)
    for role, name in names.items():
        try:
            model = _shaped(role, name, anti_expert)
        except ValueError as error:  # also Transformers' own, for an architecture that it does not know
            report.problems.append(f"{role}: {str(error).splitlines()[0]}")
            continue
        widths[role] = logits_width(model)
        shares = is_adapted(model) and anti_expert is not None
        report.models[role] = _facts(model, tokenizers[role] is not None, shares)
        try:
            if shares:
                LoraSwitch(model, role)
            check_supported(without_adapter(model, role), role)
        except SpecProxyError as error:
            report.problems.append(str(error))
    width, drafts_tokenizer = widths.pop(ASSISTANT, None), tokenizers.pop(ASSISTANT, None)
    if set(widths) == set(names) - {ASSISTANT}:
        try:
            vocabulary = share_vocabulary(widths, tokenizers)
            report.shared_vocabulary = vocabulary.size
            if width is not None:
                check_drafts_vocabulary(vocabulary, ASSISTANT, width, drafts_tokenizer, tokenizers)
        except SpecProxyError as error:
            report.problems.append(str(error))
        _expect(report)
    if all(found is None for found in tokenizers.values()):
        report.notes.append("no tokenizer was found: ids below the smallest width are taken to be shared.")
    return report


def _shaped(role: str, name: str, anti_expert: str | None) -> Any:
    """A role's model without weights, an adapter in place where it is one."""
    if role == ASSISTANT:
        refuse_adapter(name, role)
    if role == EXPERT and is_adapter(name):
        return shape_adapter(model_without_weights(anti_expert or adapter_base(name)), name)
    return model_without_weights(name)


def model_without_weights(name: str) -> Any:
    """The model that a configuration describes, on the meta device: its shapes, and no memory.

    Args:
        name: a folder or hub id.

    Raises:
        OSError: Transformers' own, for a configuration that cannot be read.
        UnsupportedModelError: for an encoder-decoder.
        ValueError: Transformers' own, for an architecture that it does not know.
    """
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} is an encoder-decoder; use a decoder-only model.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _expect(report: CheckReport) -> None:
    sizes = {role: facts.num_parameters for role, facts in report.models.items()}
    has_anti_expert = ANTI_EXPERT in sizes
    if not has_anti_expert:
        report.notes.append("no anti-expert: the expert's logits are added as they are, which is not proxy-tuning.")
    elif report.models[EXPERT].shares_weights:
        report.notes.append("the expert is an adapter on the anti-expert: one copy of weights serves both.")
    elif sizes[EXPERT] != sizes[ANTI_EXPERT]:
        report.notes.append("expert and anti-expert differ in size: they should be one model, tuned and untuned.")
    if ASSISTANT in sizes and sizes[ASSISTANT] >= sizes[EXPERT]:
        report.notes.append("the assistant is no smaller than the expert, which drafts without one.")
    report.cost_ratio = ratio = sizes[EXPERT] / sizes[BASE]
    if ratio > 0.6:
        report.notes.append("the pair is nearly as large as the base: drafting can hardly pay.")
    for acceptance in _ACCEPTANCE_LEVELS:
        count = best_num_draft_tokens(acceptance, ratio, has_anti_expert=has_anti_expert)
        report.expectations.append(
            {
                "acceptance": acceptance,
                "num_draft_tokens": count,
                "over_per_step": speedup_over_per_step(acceptance, ratio, count, has_anti_expert),
                "over_base": speedup_over_base(acceptance, ratio, count, has_anti_expert),
            }
        )


def _facts(model: Any, has_tokenizer: bool, shares_weights: bool) -> ModelFacts:
    text = model.config.get_text_config(decoder=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    own = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) if shares_weights else parameters
    # A model without attention has no cache that grows.
    attention_heads = getattr(text, "num_attention_heads", None) or 0
    heads = getattr(text, "num_key_value_heads", None) or attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // max(attention_heads, 1)
    return ModelFacts(
        architecture=type(model.get_base_model() if is_adapted(model) else model).__name__,
        num_parameters=parameters,
        weight_bytes={dtype: own * size for dtype, size in _BYTES.items()},
        kv_bytes_per_token=2 * 2 * text.num_hidden_layers * heads * head_size,
        vocab_width=logits_width(model),
        max_positions=position_limit(model),
        has_tokenizer=has_tokenizer,
        shares_weights=shares_weights,
    )


def self_test(
    model: ProxyTunedModel,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int = 48,
    num_draft_tokens: int = 4,
    drafter: str | None = None,
    repeats: int = 3,
) -> SelfTest:
    """Compare speculation with per-step decoding on one prompt.

    Args:
        model: loaded.
        prompt: int64 [1, S].
        max_new_tokens: of every run.
        num_draft_tokens, drafter: of the speculative runs.
        repeats: timed pairs, after one pair to warm up.
    """

    def run(count: int, **arguments: Any) -> tuple[list[int], GenerateOutput, float]:
        start = perf_counter()
        output = model.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            num_draft_tokens=count,
            drafter=drafter,
            return_dict_in_generate=True,
            **arguments,
        )
        assert isinstance(output, GenerateOutput)
        return output.sequences[0, prompt.shape[1] :].tolist(), output, perf_counter() - start

    coupled = {"do_sample": True, "acceptance": "coupled", "seed": 0}
    sampled, sampled_per_step = run(num_draft_tokens, **coupled)[0], run(0, **coupled)[0]
    pairs = [(run(num_draft_tokens), run(0)) for _ in range(repeats + 1)]
    (tokens, output, _), (per_step, _, _) = pairs[0]
    assert output.speculation is not None
    return SelfTest(
        tokens_equal=_common(tokens, per_step),
        tokens_compared=max(len(tokens), len(per_step)),
        coupled_equal=_common(sampled, sampled_per_step),
        coupled_compared=max(len(sampled), len(sampled_per_step)),
        acceptance_rate=output.speculation.acceptance_rate,
        speedup_over_per_step=statistics.median(slow[2] / fast[2] for fast, slow in pairs[1:]),
    )


def _common(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
