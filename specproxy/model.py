"""`ProxyTunedModel`, the public face: several models that generate as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from specproxy import demo
from specproxy.chat import ChatReply, ChatTemplate, check_messages, render_prompt
from specproxy.config import check_alpha
from specproxy.errors import ConfigurationError
from specproxy.generate import GenerateOutput, generate
from specproxy.options import parse_options
from specproxy.pretrained import find_tokenizer, load_models, load_tokenizers
from specproxy.schedule import AlphaSchedule
from specproxy.state import ANTI_EXPERT, ASSISTANT, BASE, EXPERT
from specproxy.suffix import LookupCorpus
from specproxy.trio import Trio
from specproxy_kernels import combine_logits

__all__ = ["ProxyTunedModel", "find_tokenizer"]


class ProxyTunedModel:
    """A large untuned base, steered by a small expert minus the same small model untuned.

    The law of every token is softmax(warp(s_base + alpha * (s_expert - s_anti))). Further pairs add terms of their own,
    and a pair may do without its anti-expert, so that steering by an expert alone and contrast against an amateur (a
    negative alpha) are the same arithmetic. The models stay the caller's: they are borrowed for the duration of a call
    and behave as before between calls.

    Args:
        base: the large model, a loaded Transformers causal language model.
        expert: the small tuned model. It may be a peft model whose base model, `expert.get_base_model()`, is given as
            the anti-expert: a LoRA adapter on it. Then one copy of weights serves both, and where both run over a
            window they share one pass over them.
        anti_expert: the small model untuned; without one (None) the term is alpha * s_expert.
        tokenizer: of the base; names the ids that may be generated. Without any tokenizer these are all ids below the
            smallest logit width.
        alpha: proxy strength, any finite number; 0 is the base alone.
        further_pairs: (expert, anti_expert or None, alpha) of pairs beyond the first, each adding its own term; the
            first pair's expert drafts.
        expert_tokenizer, anti_expert_tokenizer, assistant_tokenizer: where given, checked against `tokenizer`.
        assistant: any further model of the same vocabulary, for `drafter="assistant"`; no part of the law.

    Raises:
        ConfigurationError: alpha is not finite.
        UnsupportedModelError: an architecture that cannot run here.
        VocabularyError: the vocabularies do not fit.

    Source: Liu et al. 2024, "Tuning Language Models by Proxy", arXiv 2401.08565.

    Example:
        >>> model = ProxyTunedModel.demo()
        >>> inputs = model.tokenizer("Question: What is 347 + 68?\\nAnswer:", return_tensors="pt")
        >>> output = model.generate(inputs.input_ids, max_new_tokens=48, return_dict_in_generate=True)
        >>> 0.0 <= output.speculation.acceptance_rate <= 1.0
        True
    """

    def __init__(
        self,
        base: PreTrainedModel,
        expert: PreTrainedModel,
        anti_expert: PreTrainedModel | None = None,
        tokenizer: Any = None,
        alpha: float = 1.0,
        *,
        expert_tokenizer: Any = None,
        anti_expert_tokenizer: Any = None,
        further_pairs: Sequence[tuple[PreTrainedModel, PreTrainedModel | None, float]] = (),
        assistant: PreTrainedModel | None = None,
        assistant_tokenizer: Any = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.corpus: LookupCorpus | None = None  # what lookup may copy from beside a row's own text
        self.expert_tokenizer = expert_tokenizer if expert_tokenizer is not None else tokenizer
        self._trio = Trio(
            base,
            expert,
            anti_expert,
            {
                BASE: tokenizer,
                EXPERT: expert_tokenizer,
                ANTI_EXPERT: anti_expert_tokenizer,
                ASSISTANT: assistant_tokenizer,
            },
            alpha,
            further_pairs,
            assistant,
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        *,
        expert: str,
        anti_expert: str | None = None,
        assistant: str | None = None,
        alpha: float = 1.0,
        tokenizer: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        quantization_config: Any = None,
        base_kwargs: dict[str, Any] | None = None,
        expert_kwargs: dict[str, Any] | None = None,
        anti_expert_kwargs: dict[str, Any] | None = None,
        assistant_kwargs: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> ProxyTunedModel:
        """Load the models from local folders or a hub.

        Args:
            base, expert, anti_expert: folders or hub ids; None for no anti-expert. The expert may be a LoRA adapter
                (needs peft): it is put on the anti-expert, which has to be the model it was trained on, or, without
                one, on the model that it names itself.
            assistant: likewise, a further model of the same vocabulary for `drafter="assistant"`; no adapter.
            alpha: proxy strength.
            tokenizer: a tokenizer, folder or hub id for the base; by default that of its folder. Tokenizers found
                beside the other models are checked against it.
            dtype, device_map, quantization_config: of all models, as in `AutoModelForCausalLM.from_pretrained`.
            base_kwargs, expert_kwargs, anti_expert_kwargs, assistant_kwargs: further keyword arguments of one model
                (revision, dtype, device_map, ...); they override the shared ones. Those of an adapter go to
                `PeftModel.from_pretrained`.
            progress: show one progress bar on stderr.

        Returns:
            The loaded model.

        Raises:
            As the constructor; ConfigurationError for arguments of a model that is not named; and whatever Transformers
            raises for a folder it cannot load.
        """
        check_alpha(alpha)
        shared = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
        shared = {name: value for name, value in shared.items() if value is not None}
        given = {BASE: base, EXPERT: expert, ANTI_EXPERT: anti_expert, ASSISTANT: assistant}
        names = {role: name for role, name in given.items() if name is not None}
        own = {
            BASE: base_kwargs,
            EXPERT: expert_kwargs,
            ANTI_EXPERT: anti_expert_kwargs,
            ASSISTANT: assistant_kwargs,
        }
        idle = next((role for role, arguments in own.items() if arguments and role not in names), None)
        if idle is not None:
            raise ConfigurationError(f"{idle}_kwargs was given without {idle}; name the {idle}, or leave it out.")
        tokenizers = load_tokenizers(names, tokenizer)
        models = load_models(names, shared, own, progress)
        return cls(
            models[BASE],
            models[EXPERT],
            models.get(ANTI_EXPERT),
            tokenizers[BASE],
            alpha,
            expert_tokenizer=tokenizers[EXPERT],
            anti_expert_tokenizer=tokenizers.get(ANTI_EXPERT),
            assistant=models.get(ASSISTANT),
            assistant_tokenizer=tokenizers.get(ASSISTANT),
        )

    @classmethod
    def demo(
        cls,
        task: str = "arithmetic",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        assistant: str | None = None,
    ) -> ProxyTunedModel:
        """The embedded trio, loaded from the package without a network.

        Args:
            task: "arithmetic" (step-by-step sums) or "python" (source text).
            device: the CPU by default.
            dtype: float32 by default.
            assistant: as in `from_pretrained`.

        Raises:
            ConfigurationError: there is no such task.
        """
        if assistant is None:
            return cls(**demo.load(task, device=device, dtype=dtype))
        folders = demo.folders(task)
        return cls.from_pretrained(
            folders["base"],
            expert=folders["expert"],
            anti_expert=folders["anti_expert"],
            tokenizer=folders["tokenizer"],
            assistant=assistant,
            alpha=demo.alpha(task),
            dtype=dtype or torch.float32,
            device_map=device,
            progress=False,
        )

    @property
    def alpha(self) -> float:
        """Strength of the first pair."""
        return self._trio.pairs[0].alpha

    @property
    def base(self) -> PreTrainedModel:
        """The large untuned model."""
        base: PreTrainedModel = self._trio.given[BASE]
        return base

    @property
    def expert(self) -> PreTrainedModel:
        """The small tuned model."""
        expert: PreTrainedModel = self._trio.given[EXPERT]
        return expert

    @property
    def anti_expert(self) -> PreTrainedModel | None:
        """The small model untuned; None where the first pair has none."""
        return self._trio.given.get(ANTI_EXPERT)

    @property
    def assistant(self) -> PreTrainedModel | None:
        """The model that drafts under `drafter="assistant"`; None where there is none."""
        return self._trio.assistant

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

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """End and pad ids as `generate` uses them, and Transformers' defaults otherwise."""
        eos = sorted(self._trio.eos_token_ids())
        return GenerationConfig(eos_token_id=eos or None, pad_token_id=self._trio.pad_token_id())

    input_modalities = output_modalities = ("text",)  # what Transformers' pipelines print of a model

    def can_generate(self) -> bool:
        """True: Transformers' pipelines ask."""
        return True

    def to(self, device: str | torch.device) -> ProxyTunedModel:
        """Move all models, in place."""
        for model in self._trio.all_models:
            model.to(device)
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Combined logits of whole sequences, by one plain forward of each model.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 1 for tokens, 0 for padding.

        Returns:
            `.logits`: [B, S, V] in float32, or in the models' dtype where that is wider; -inf at ids that are not
            shared.
        """
        masked: dict[str, Tensor] = {}
        if attention_mask is not None:
            # Positions count tokens, not padding: learned positions would shift otherwise.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            masked = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits: dict[str, Tensor] = {}
        for role in self._trio.models:
            with self._trio.called(role) as model:
                own = {name: value.to(model.device) for name, value in masked.items()}
                logits[role] = model(input_ids=input_ids.to(model.device), **own).logits.to(self.device)
        strength = torch.ones(input_ids.shape, dtype=torch.float64, device=self.device)
        pairs = [pair.term(logits, pair.alpha * strength) for pair in self._trio.pairs]
        allowed = self._trio.vocabulary.allowed
        allowed = None if allowed is None else allowed.to(self.device)
        combined, _ = combine_logits(logits[BASE], pairs, self.vocab_size, allowed)
        return CausalLMOutput(logits=combined)

    __call__ = forward

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_draft_tokens: int | Literal["auto"] = 4,
        num_tree_tokens: int = 0,
        acceptance: str = "rejection",
        cuda_graphs: bool | None = None,
        drafter: str | None = None,
        corpus: LookupCorpus | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        alpha: float | Sequence[float] | Tensor | None = None,
        alpha_schedule: AlphaSchedule | Sequence[AlphaSchedule | None] | None = None,
        expert_input_ids: Tensor | None = None,
        expert_attention_mask: Tensor | None = None,
        anti_expert_input_ids: Tensor | None = None,
        anti_expert_attention_mask: Tensor | None = None,
        streamer: Any = None,
        return_dict_in_generate: bool | None = None,
        **transformers_arguments: Any,
    ) -> Tensor | GenerateOutput:
        """Generate exactly as per-step proxy-tuning would, several tokens a cycle.

        A value that is not given comes from `generation_config`, else it is Transformers' default. The models' own
        generation configurations supply end and pad ids alone.

        Args:
            input_ids: int64 [B, S], prompts, padded on the left where their lengths differ.
            attention_mask: [B, S], 1 for tokens, 0 for padding; without it leading pad ids are padding.
            generation_config: a `transformers.GenerationConfig` with further defaults.
            max_new_tokens: tokens per row, at least 1; 20 unless max_length says otherwise.
            do_sample: draw from the target law; greedy by default.
            temperature, top_k, top_p, min_p, repetition_penalty: the warp, in Transformers' order and with its
                defaults (1.0, 50, 1.0, none, 1.0); ties at a filter's boundary are kept. `top_k=0` keeps every token.
            num_draft_tokens: drafts per cycle; 0 is exact per-step decoding, "auto" follows acceptance and measured
                cost.
            num_tree_tokens: nodes of a token tree, at most 63, that a cycle drafts in place of a chain, up to
                `num_draft_tokens` deep; for greedy decoding and `acceptance="coupled"`. 0 drafts chains.
            acceptance: "rejection", "block" or "coupled" (the tokens of per-step decoding with the same seed).
            cuda_graphs: replay captured cycles instead of launching every kernel: the same tokens, sooner. None does so
                where all models are on one CUDA device; caches and captures are then kept for the next call, and freed
                by one with False.
            drafter: who proposes: "expert"; "lookup", which copies from prompt, output and corpus at no cost;
                "cascade", the expert's drafts with lookup's guesses to save it forwards; "assistant". None is the
                expert, and under "auto" whoever serves best. It changes no law.
            corpus: texts beside each row's own that lookup may copy from; the model's `corpus` by default.
            seed: an int for the call, or one per row; then a row's tokens depend on its own seed alone.
            generator: where the rows' keys come from without a seed; torch's global generator by default.
            alpha: overrides the first pair's strength, for the call or per row; [B, pairs] overrides all.
            alpha_schedule: an `AlphaSchedule`, or one per row: how all strengths change over the new tokens.
            expert_input_ids, anti_expert_input_ids: a role's own prompts [B, S'], else it reads `input_ids`.
            expert_attention_mask, anti_expert_attention_mask: their masks.
            streamer: one of Transformers' (one sequence) or a `RowStreamer`.
            return_dict_in_generate: return a `GenerateOutput` instead of a tensor.
            transformers_arguments: under their names in Transformers: min_new_tokens, max_length, min_length, max_time,
                stop_strings, tokenizer, eos_token_id, pad_token_id, num_return_sequences, output_scores, output_logits,
                typical_p, epsilon_cutoff, eta_cutoff, top_h, no_repeat_ngram_size, bad_words_ids, suppress_tokens,
                begin_suppress_tokens, sequence_bias, exponential_decay_length_penalty, forced_bos_token_id,
                forced_eos_token_id, remove_invalid_values, renormalize_logits, prefix_allowed_tokens_fn,
                logits_processor and stopping_criteria (pure functions, called per row with that row's unpadded prefix
                [1, L]); as OpenAI defines them, presence_penalty and frequency_penalty; and grammar, which every row is
                held to (see `specproxy.grammar`).

        Returns:
            int64 [B * num_return_sequences, S + new], or a `GenerateOutput` with `sequences`, `speculation` and, where
            asked for, `scores` (processed and warped) and `logits` (combined), float32 [B, V] per new token, NaN after
            a row's end.

        Raises:
            ConfigurationError: an argument's value, or an unknown or unsupported keyword.
            PromptError: a prompt or mask.
            LogitsError: a model returned logits that no token can be drawn from; other rows are in its `partial`.
            GraphCaptureError: a model cannot be captured.
        """
        given = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "return_dict_in_generate": return_dict_in_generate,
            **transformers_arguments,
        }
        options = parse_options(
            given,
            generation_config,
            num_draft_tokens,
            acceptance,
            self.tokenizer,
            cuda_graphs,
            num_tree_tokens,
            drafter,
        )
        output = generate(
            self._trio,
            input_ids,
            attention_mask,
            options=options,
            alpha=alpha,
            alpha_schedule=alpha_schedule,
            seed=seed,
            generator=generator,
            role_prompts={
                EXPERT: (expert_input_ids, expert_attention_mask),
                ANTI_EXPERT: (anti_expert_input_ids, anti_expert_attention_mask),
            },
            streamer=streamer,
            corpus=self.corpus if corpus is None else corpus,
        )
        return output if options.return_dict_in_generate else output.sequences

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        *,
        base_template: ChatTemplate | None = None,
        expert_template: ChatTemplate | None = None,
        anti_expert_template: ChatTemplate | None = None,
        max_new_tokens: int = 256,
        **arguments: Any,
    ) -> ChatReply:
        """Answer a conversation; pass the reply's `messages` on for the next turn.

        Args:
            messages: dictionaries with "role" ("system", "user" or "assistant") and "content", ending with the user's
                turn.
            base_template: "chat" (its tokenizer's template), "raw" (the contents alone), a Jinja template, or a
                function from messages to text; by default "chat" where the tokenizer has a template, else "raw".
            expert_template: likewise, with the expert's tokenizer.
            anti_expert_template: likewise; by default what the base reads.
            max_new_tokens: of the answer.
            arguments: of `generate`.

        Raises:
            PromptError: a malformed conversation.
            ConfigurationError: no tokenizer, or "chat" without a template.
        """
        if self.tokenizer is None:
            raise ConfigurationError("tokenizer=None: chat needs text; construct the model with a tokenizer.")
        conversation = check_messages(messages)
        base = render_prompt(conversation, base_template, self.tokenizer, "base_template")
        expert = render_prompt(conversation, expert_template, self.expert_tokenizer, "expert_template")
        prompts = {"": base, "expert_": expert}
        if anti_expert_template is not None:
            if self.anti_expert is None:
                raise ConfigurationError("anti_expert_template was given, but the model has no anti_expert; remove it.")
            prompts["anti_expert_"] = render_prompt(
                conversation, anti_expert_template, self.tokenizer, "anti_expert_template"
            )
        for prefix, (prompt, adds_special_tokens) in prompts.items():
            tokenizer = self.expert_tokenizer if prefix == "expert_" else self.tokenizer
            encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=adds_special_tokens)
            arguments[f"{prefix}input_ids"] = encoded.input_ids.to(self.device)
            arguments[f"{prefix}attention_mask"] = torch.ones_like(arguments[f"{prefix}input_ids"])
        arguments["return_dict_in_generate"] = True
        output = self.generate(max_new_tokens=max_new_tokens, **arguments)
        assert isinstance(output, GenerateOutput)
        new = output.sequences[0, arguments["input_ids"].shape[1] :]
        text = str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        return ChatReply(text, [*conversation, {"role": "assistant", "content": text}], output)
