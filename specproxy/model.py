"""`ProxyTunedModel`, the public face: three models that generate as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging as transformers_logging

from specproxy import demo
from specproxy.config import SamplingParameters, SpeculationParameters, check_alpha
from specproxy.generate import GenerateOutput, generate
from specproxy.state import ANTI_EXPERT, BASE, EXPERT, ROLES
from specproxy.trio import Trio
from specproxy_kernels import LogitPair, combine_logits

__all__ = ["ProxyTunedModel"]


class ProxyTunedModel:
    """A large untuned base, steered by a small expert minus the same small model untuned.

    The law of every token is softmax(warp(s_base + alpha * (s_expert - s_anti))). The models stay the caller's: they
    are borrowed for the duration of a call and behave as before between calls.

    Args:
        base: the large model, a loaded Transformers causal language model.
        expert: the small tuned model.
        anti_expert: the small model untuned.
        tokenizer: of the base; names the ids that may be generated. Without any tokenizer these are all ids below the
            smallest logit width.
        alpha: proxy strength, any finite number; 0 is the base alone.
        expert_tokenizer, anti_expert_tokenizer: where given, checked against `tokenizer`.

    Raises:
        ConfigurationError: alpha is not finite.
        UnsupportedModelError: an architecture that cannot run here.
        VocabularyError: the vocabularies do not fit.

    Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565.

    Example:
        >>> model = ProxyTunedModel.demo()
        >>> inputs = model.tokenizer("Question: What is 347 + 68?\\nAnswer:", return_tensors="pt")
        >>> output = model.generate(inputs.input_ids, max_new_tokens=48, return_dict_in_generate=True)
        >>> output.speculation.acceptance_rate  # doctest: +SKIP
        0.89
    """

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        anti_expert: PreTrainedModel,
        tokenizer: Any = None,
        alpha: float = 1.0,
        *,
        expert_tokenizer: Any = None,
        anti_expert_tokenizer: Any = None,
    ) -> None:
        self.alpha = check_alpha(alpha)
        self.tokenizer = tokenizer
        self._trio = Trio(
            base,
            expert,
            anti_expert,
            {BASE: tokenizer, EXPERT: expert_tokenizer, ANTI_EXPERT: anti_expert_tokenizer},
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        *,
        expert: str,
        anti_expert: str,
        alpha: float = 1.0,
        tokenizer: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        quantization_config: Any = None,
        base_kwargs: dict[str, Any] | None = None,
        expert_kwargs: dict[str, Any] | None = None,
        anti_expert_kwargs: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> ProxyTunedModel:
        """Load three models from local folders or a hub.

        Args:
            base, expert, anti_expert: folders or hub ids.
            alpha: proxy strength.
            tokenizer: a tokenizer, folder or hub id for the base; by default that of its folder. Tokenizers found
                beside expert and anti-expert are checked against it.
            dtype, device_map, quantization_config: of all three models, as in `AutoModelForCausalLM.from_pretrained`.
            base_kwargs, expert_kwargs, anti_expert_kwargs: further keyword arguments of one model; they override the
                shared ones.
            progress: show one progress bar on stderr.

        Returns:
            The loaded model.

        Raises:
            As the constructor, and whatever Transformers raises for a folder it cannot load.
        """
        check_alpha(alpha)
        shared = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
        shared = {name: value for name, value in shared.items() if value is not None}
        names = {BASE: base, EXPERT: expert, ANTI_EXPERT: anti_expert}
        own = {BASE: base_kwargs, EXPERT: expert_kwargs, ANTI_EXPERT: anti_expert_kwargs}
        tokenizers = {role: _find_tokenizer(name) for role, name in names.items()}
        if tokenizer is not None:
            tokenizers[BASE] = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
        models = {}
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            for role in track(ROLES, "Loading models", console=Console(stderr=True), disable=not progress):
                models[role] = AutoModelForCausalLM.from_pretrained(names[role], **{**shared, **(own[role] or {})})
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        return cls(
            models[BASE],
            models[EXPERT],
            models[ANTI_EXPERT],
            tokenizers[BASE],
            alpha,
            expert_tokenizer=tokenizers[EXPERT],
            anti_expert_tokenizer=tokenizers[ANTI_EXPERT],
        )

    @classmethod
    def demo(
        cls, task: str = "arithmetic", *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ProxyTunedModel:
        """The embedded trio, loaded from the package without a network.

        Args:
            task: "arithmetic" (step-by-step sums) or "python" (source text).
            device: the CPU by default.
            dtype: float32 by default.

        Raises:
            ConfigurationError: there is no such task.
        """
        return cls(**demo.load(task, device=device, dtype=dtype))

    @property
    def base(self) -> PreTrainedModel:
        """The large untuned model."""
        return self._trio.models[BASE]

    @property
    def expert(self) -> PreTrainedModel:
        """The small tuned model."""
        return self._trio.models[EXPERT]

    @property
    def anti_expert(self) -> PreTrainedModel:
        """The small model untuned."""
        return self._trio.models[ANTI_EXPERT]

    @property
    def vocab_size(self) -> int:
        """V, the shared vocabulary: the width of the combined logits."""
        return self._trio.vocabulary.size

    @property
    def device(self) -> torch.device:
        """Where tokens are drawn: the device of the base's logits."""
        return self._trio.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return self.base.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Combined logits of whole sequences, by one plain forward of each model.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 1 for tokens, 0 for padding.

        Returns:
            `.logits`: [B, S, V] in float32, or in the models' dtype where that is wider; -inf at ids that are not
            shared.
        """
        logits = {
            role: model(
                input_ids=input_ids.to(model.device),
                attention_mask=None if attention_mask is None else attention_mask.to(model.device),
            ).logits.to(self.device)
            for role, model in self._trio.models.items()
        }
        alpha = torch.full(input_ids.shape, self.alpha, dtype=torch.float64, device=self.device)
        pair = LogitPair(logits[EXPERT], logits[ANTI_EXPERT], alpha)
        combined, _ = combine_logits(logits[BASE], [pair], self.vocab_size, self._trio.vocabulary.allowed)
        return CausalLMOutput(logits=combined)

    __call__ = forward

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float | None = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 1.0,
        min_p: float | None = None,
        repetition_penalty: float | None = 1.0,
        num_draft_tokens: int | Literal["auto"] = 4,
        acceptance: str = "rejection",
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        alpha: float | Sequence[float] | Tensor | None = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        anti_expert_input_ids: Tensor | None = None,
        anti_expert_attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: Any = None,
        return_dict_in_generate: bool = False,
        **unknown: Any,
    ) -> Tensor | GenerateOutput:
        """Generate exactly as per-step proxy-tuning would, several tokens a cycle.

        Args:
            input_ids: int64 [B, S], prompts, padded on the left where their lengths differ.
            attention_mask: [B, S], 1 for tokens, 0 for padding; without it leading pad ids are padding.
            max_new_tokens: tokens per row, at least 1.
            do_sample: draw from the target law; greedy otherwise.
            temperature, top_k, top_p, min_p, repetition_penalty: the warp, in Hugging Face's order and with its
                defaults; ties at a filter's boundary are kept. `top_k=0` keeps every token.
            num_draft_tokens: drafts per cycle; 0 is exact per-step decoding, "auto" follows acceptance and measured
                cost.
            acceptance: "rejection", "block" or "coupled" (the tokens of per-step decoding with the same seed).
            seed: an int for the call, or one per row; then a row's tokens depend on its own seed alone.
            generator: where the rows' keys come from without a seed; torch's global generator by default.
            alpha: overrides the model's, for the call or per row.
            expert_input_ids, anti_expert_input_ids: a role's own prompts [B, S'], else it reads `input_ids`.
            expert_attention_mask, anti_expert_attention_mask: their masks.
            eos_token_id: ids that end a row; by default those of base's and expert's generation configurations.
            pad_token_id: fills finished rows; by default the base's, else the first end id.
            streamer: gets the prompt, then every token; single prompts only.
            return_dict_in_generate: return a `GenerateOutput` instead of a tensor.

        Returns:
            int64 [B, S + new], or a `GenerateOutput` with `sequences` and `speculation`.

        Raises:
            ConfigurationError: an argument's value, or an unknown keyword.
            PromptError: a prompt or mask.
            LogitsError: a model returned logits that no token can be drawn from; other rows are in its `partial`.
        """
        output = generate(
            self._trio,
            input_ids,
            attention_mask,
            sampling=SamplingParameters(do_sample, temperature, top_k, top_p, min_p, repetition_penalty),
            speculation=SpeculationParameters(num_draft_tokens, acceptance),
            max_new_tokens=max_new_tokens,
            alpha=self.alpha if alpha is None else alpha,
            seed=seed,
            generator=generator,
            role_prompts={
                EXPERT: (expert_input_ids, expert_attention_mask),
                ANTI_EXPERT: (anti_expert_input_ids, anti_expert_attention_mask),
            },
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            streamer=streamer,
            unknown=unknown,
        )
        return output if return_dict_in_generate else output.sequences


def _find_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, or None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
