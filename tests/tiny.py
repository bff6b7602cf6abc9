"""Tiny random models and tokenizers for the end-to-end tests.

Every model is made from a configuration class and a seed; nothing is read from disk or from a network. Weights are
drawn wide enough that argmaxes vary and laws are far from uniform. This module knows nothing about specproxy.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

VOCAB_SIZE = 40
BASE_LAYERS = 3
PAIR_LAYERS = 2
HIDDEN = 32

#: Architectures that specproxy decodes.
SUPPORTED = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
)
#: Architectures that it must refuse by name: own attention, recurrent state, or an encoder.
REFUSED = (
    "falcon",
    "bloom",
    "mamba",
    "mamba2",
    "t5",
    "bart",
    "qwen3_next",
    "jamba",
    "recurrent_gemma",
    "lfm2",
)

_NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _decoder(layers: int, vocab_size: int, **extra: Any) -> dict[str, Any]:
    """Keyword arguments that the Llama-like configurations share: two query heads per key head."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **_NO_SPECIAL,
        **extra,
    }


def _layer_types(layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _llama(layers: int, vocab: int) -> Any:
    return transformers.LlamaConfig(**_decoder(layers, vocab))


def _qwen3(layers: int, vocab: int) -> Any:
    return transformers.Qwen3Config(**_decoder(layers, vocab, head_dim=8))


def _mistral(layers: int, vocab: int) -> Any:
    return transformers.MistralConfig(**_decoder(layers, vocab, sliding_window=6, head_dim=8))


def _gemma2(layers: int, vocab: int) -> Any:
    return transformers.Gemma2Config(
        **_decoder(
            layers, vocab, sliding_window=6, head_dim=8, query_pre_attn_scalar=8, layer_types=_layer_types(layers)
        )
    )


def _gemma3(layers: int, vocab: int) -> Any:
    return transformers.Gemma3TextConfig(
        **_decoder(
            layers, vocab, sliding_window=5, head_dim=8, query_pre_attn_scalar=8, layer_types=_layer_types(layers)
        )
    )


def _olmo2(layers: int, vocab: int) -> Any:
    return transformers.Olmo2Config(**_decoder(layers, vocab))


def _phi3(layers: int, vocab: int) -> Any:
    return transformers.Phi3Config(**_decoder(layers, vocab, original_max_position_embeddings=128))


def _mixtral(layers: int, vocab: int) -> Any:
    return transformers.MixtralConfig(
        **_decoder(layers, vocab, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    )


def _gpt2(layers: int, vocab: int) -> Any:
    return transformers.GPT2Config(
        vocab_size=vocab,
        n_positions=96,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=4,
        tie_word_embeddings=False,
        **_NO_SPECIAL,
    )


def _gpt_neox(layers: int, vocab: int) -> Any:
    return transformers.GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **_NO_SPECIAL,
    )


def _opt(layers: int, vocab: int) -> Any:
    return transformers.OPTConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )


def _falcon(layers: int, vocab: int) -> Any:
    return transformers.FalconConfig(
        vocab_size=vocab, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=4, **_NO_SPECIAL
    )


def _bloom(layers: int, vocab: int) -> Any:
    return transformers.BloomConfig(vocab_size=vocab, hidden_size=HIDDEN, n_layer=layers, n_head=4, **_NO_SPECIAL)


def _mamba(layers: int, vocab: int) -> Any:
    return transformers.MambaConfig(
        vocab_size=vocab, hidden_size=HIDDEN, state_size=4, num_hidden_layers=layers, **_NO_SPECIAL
    )


def _mamba2(layers: int, vocab: int) -> Any:
    return transformers.Mamba2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        state_size=8,
        num_hidden_layers=layers,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=8,
        **_NO_SPECIAL,
    )


def _t5(layers: int, vocab: int) -> Any:
    return transformers.T5Config(
        vocab_size=vocab,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=48,
        num_layers=layers,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _bart(layers: int, vocab: int) -> Any:
    return transformers.BartConfig(
        vocab_size=vocab,
        d_model=HIDDEN,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )


def _qwen3_next(layers: int, vocab: int) -> Any:
    return transformers.Qwen3NextConfig(
        **_decoder(
            layers,
            vocab,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )


def _jamba(layers: int, vocab: int) -> Any:
    return transformers.JambaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        **_NO_SPECIAL,
    )


def _recurrent_gemma(layers: int, vocab: int) -> Any:
    return transformers.RecurrentGemmaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        lru_width=HIDDEN,
        attention_window_size=8,
        **_NO_SPECIAL,
    )


def _lfm2(layers: int, vocab: int) -> Any:
    return transformers.Lfm2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv"] * (layers - 1) + ["full_attention"],
        **_NO_SPECIAL,
    )


_CONFIGS: dict[str, Callable[[int, int], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "mixtral": _mixtral,
    "falcon": _falcon,
    "bloom": _bloom,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "t5": _t5,
    "bart": _bart,
    "qwen3_next": _qwen3_next,
    "jamba": _jamba,
    "recurrent_gemma": _recurrent_gemma,
    "lfm2": _lfm2,
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "falcon": "FalconForCausalLM",
    "bloom": "BloomForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "qwen3_next": "Qwen3NextForCausalLM",
    "jamba": "JambaForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
}


def class_name(kind: str) -> str:
    """The Transformers class that `kind` stands for."""
    return _CLASSES[kind]


def dtype_for(kind: str) -> torch.dtype:
    """Float64, except where a layer has no such path on a CPU (grouped expert products, recurrences)."""
    return torch.float32 if kind == "mixtral" or kind in REFUSED else torch.float64


def tiny_model(
    kind: str,
    *,
    layers: int = PAIR_LAYERS,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Any:
    """Build one random model of an architecture in evaluation mode; `overrides` are set on its configuration."""
    config = _CONFIGS[kind](layers, vocab_size)
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise ValueError(f"{kind} has no setting {name}")
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, _CLASSES[kind])(config)
    model = model.to(dtype or dtype_for(kind)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim < 2:
                parameter.add_(_normal(parameter, generator), alpha=0.1)
            else:
                parameter.copy_(_normal(parameter, generator) * _std(name))
    model.generation_config = transformers.GenerationConfig()
    return model


def _normal(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def _std(name: str) -> float:
    """Wide output projections give peaked laws, wide learned positions make a slip by one visible."""
    if any(part in name for part in ("lm_head", "embed_out")):
        return 0.5
    if any(part in name for part in ("wpe", "embed_positions")):
        return 3.0
    if any(part in name for part in ("embed", "wte")):
        return 0.7
    return 0.25


@dataclass
class Trio:
    """Base, expert and anti-expert with a `kind` for messages."""

    base: Any
    expert: Any
    anti_expert: Any
    kind: str

    @property
    def models(self) -> tuple[Any, Any, Any]:
        return self.base, self.expert, self.anti_expert

    @property
    def vocab_size(self) -> int:
        """The width that the three output layers share."""
        return min(model.get_output_embeddings().weight.shape[0] for model in self.models)


def make_trio(
    kind: str,
    pair_kind: str | None = None,
    *,
    seed: int = 0,
    vocab_sizes: tuple[int, int, int] = (VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE),
    dtype: torch.dtype | None = None,
    tuning: float | None = None,
    drift: float = 0.05,
    overrides: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = ({}, {}, {}),
) -> Trio:
    """Build a fresh trio whose drafts are neither always kept nor always rejected.

    The expert is the anti-expert plus noise of relative size `tuning`. Where base and pair share an architecture, the
    base starts from the anti-expert's weights (relative noise `drift`) and has one more layer of its own, of small
    effect; where they do not, only a pair that is tuned far apart agrees with the target now and then.
    """
    pair_kind = pair_kind or kind
    if tuning is None:
        tuning = 0.08 if kind == pair_kind else 1.5
    dtype = dtype or (torch.float32 if "mixtral" in (kind, pair_kind) else torch.float64)
    pair: dict[str, Any] = {"layers": PAIR_LAYERS, "dtype": dtype, "seed": seed + 1}
    anti_expert = tiny_model(pair_kind, vocab_size=vocab_sizes[2], **pair, **overrides[2])
    expert = tiny_model(pair_kind, vocab_size=vocab_sizes[1], **pair, **overrides[1])
    base = tiny_model(kind, layers=BASE_LAYERS, vocab_size=vocab_sizes[0], dtype=dtype, seed=seed + 2, **overrides[0])
    _copy_and_perturb(anti_expert, expert, tuning, seed + 3)
    if kind == pair_kind:
        _copy_and_perturb(anti_expert, base, drift, seed + 4)
    return Trio(base, expert, anti_expert, kind if kind == pair_kind else f"{kind}+{pair_kind}")


def _copy_and_perturb(source: Any, target: Any, noise: float, seed: int) -> None:
    """Copy what both models have (leading rows of unequal tables), add noise, damp what only `target` has."""
    generator = torch.Generator().manual_seed(seed)
    known = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in sorted(target.named_parameters()):
            other = known.get(name)
            if other is None:
                if parameter.ndim >= 2:
                    parameter.mul_(0.5)
                continue
            rows = min(len(parameter), len(other))
            parameter[:rows] = other[:rows]
            scale = parameter.std() if parameter.ndim >= 2 else torch.tensor(0.3)
            parameter.add_(_normal(parameter, generator) * scale * noise)


@functools.cache
def shared_trio(kind: str, pair_kind: str | None = None, seed: int = 0) -> Trio:
    """The trio of these arguments, built once a run: only for tests that leave it as it was."""
    return make_trio(kind, pair_kind, seed=seed)


def same_model_trio(kind: str, seed: int = 0) -> Trio:
    """Three equal models: every draft must be kept."""
    base = tiny_model(kind, layers=PAIR_LAYERS, seed=seed)
    return Trio(base, copy.deepcopy(base), copy.deepcopy(base), kind)


def prompts(lengths: list[int], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Random rows of token ids with these lengths; ids 0 and 1 stay free for padding and end of text."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def left_pad(rows: list[list[int]], pad: int = 0, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-pad rows to one width (plus `extra` columns): `input_ids` and `attention_mask`, both int64 [B, S]."""
    width = max(len(row) for row in rows) + extra
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def tiny_tokenizer(
    size: int = VOCAB_SIZE, *, renamed: dict[int, str] | None = None, missing: tuple[int, ...] = ()
) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer of ids 0..size-1: `<pad>`, `<eos>`, `<unk>`, then w3, w4, ...

    Args:
        size: number of ids, counting those that are missing.
        renamed: other words for some ids.
        missing: ids that no word has.
    """
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{index}" for index in range(3, size)]
    for index, word in (renamed or {}).items():
        words[index] = word
    table = {word: index for index, word in enumerate(words) if index not in missing}
    tokenizer = Tokenizer(WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def save_trio(folder: Path, prompts: list[str]) -> list[str]:
    """A trio, its tokenizer and prompts on disk.

    Args:
        folder: gets a folder for each role, the tokenizer beside the base, and `prompts.jsonl`.
        prompts: words of `tiny_tokenizer`.

    Returns:
        The arguments by which a benchmark's command line takes them.
    """
    trio = make_trio("llama")
    arguments = []
    for name, model in (("base", trio.base), ("expert", trio.expert), ("anti-expert", trio.anti_expert)):
        model.save_pretrained(folder / name)
        arguments += [f"--{name}", str(folder / name)]
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    return [*arguments, "--prompts", str(folder / "prompts.jsonl")]
