"""A grown model is the same function in another shape: logits, tokens, and the shape itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from benchmarks import grow as command
from benchmarks.grow import SHAPES, Shape, cost_parameters, grow, grow_to_cost_ratio, parse_shape
from specproxy import ProxyTunedModel

VOCAB = 40
ALL = Shape(layers=5, hidden=80, heads=12, kv_heads=6, feed_forward=100, vocab=64)
KINDS = {
    "layers": Shape(layers=5),
    "hidden": Shape(hidden=80),
    "hidden by four": Shape(hidden=128),
    "heads": Shape(heads=8),
    "heads and key-value heads": Shape(heads=12, kv_heads=6),
    "key-value heads in larger groups": Shape(heads=20, kv_heads=4),
    "a key-value head for every query head": Shape(heads=8, kv_heads=8),
    "a group divided": Shape(heads=12, kv_heads=12),
    "feed-forward": Shape(feed_forward=100),
    "vocabulary": Shape(vocab=64),
    "untied": Shape(untie=True),
    "all": ALL,
    "all, untied": Shape(layers=5, hidden=80, heads=12, kv_heads=6, feed_forward=100, vocab=64, untie=True),
}


def build(kind: str = "llama", dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A random model with wide weights, norms that are not one, and biases that are not zero."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **overrides,
    }
    torch.manual_seed(0)
    config, model_class = (
        (LlamaConfig(**settings), LlamaForCausalLM) if kind == "llama" else (Qwen2Config(**settings), Qwen2ForCausalLM)
    )
    model = model_class(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.copy_(0.25 * noise + ("norm" in name))
    return model


MODELS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "a head size of its own": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"kind": "qwen2"},
}
IDS = torch.tensor([[3, 17, 5, 39, 0, 8, 21], [9, 9, 2, 30, 31, 1, 4]])


@functools.cache
def original(name: str, dtype: torch.dtype) -> Any:
    return build(dtype=dtype, **MODELS[name])


def exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Transformers' norm without its detour through float32, which would hide everything below 1e-7."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits[..., :VOCAB]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_equal(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    single = original(model, torch.float32)
    assert torch.allclose(logits(grow(single, KINDS[kind])), logits(single), rtol=1e-5, atol=1e-5)
    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm)
    double = original(model, torch.float64)
    grown = grow(double, KINDS[kind])
    assert grown.dtype == torch.float64
    assert torch.allclose(logits(grown), logits(double), rtol=1e-10, atol=1e-10)


def test_a_wrong_norm_would_be_seen() -> None:
    model = original("grouped", torch.float32)
    grown = grow(model, KINDS["hidden"])
    with torch.no_grad():
        grown.model.norm.weight.mul_(1.001)
    assert not torch.allclose(logits(grown), logits(model), rtol=1e-5, atol=1e-5)


def test_every_new_weight_is_finite_and_of_the_initial_scale() -> None:
    grown = grow(build(dtype=torch.float16), ALL)
    for name, parameter in grown.named_parameters():
        assert bool(parameter.isfinite().all()), name
    fresh = grown.model.layers[4]
    assert fresh.self_attn.q_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not fresh.self_attn.o_proj.weight.any() and not fresh.mlp.down_proj.weight.any()
    same, other = grow(build(dtype=torch.float16), ALL), grow(build(dtype=torch.float16), ALL, seed=1)
    assert torch.equal(same.model.layers[4].mlp.up_proj.weight, fresh.mlp.up_proj.weight)
    assert not torch.equal(other.model.layers[4].mlp.up_proj.weight, fresh.mlp.up_proj.weight)


def test_the_original_is_left_alone() -> None:
    model = build(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    grow(model, ALL)
    assert model.config.to_dict() == config
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_a_grown_base_generates_the_same_tokens(num_draft_tokens: int) -> None:
    trio = tiny.make_trio("llama")
    prompts = torch.tensor([[5, 8, 13, 21]])
    models = [trio.base, grow(trio.base, ALL)]
    outputs = [
        ProxyTunedModel(base, trio.expert, trio.anti_expert, tiny.tiny_tokenizer()).generate(
            prompts, max_new_tokens=24, num_draft_tokens=num_draft_tokens
        )
        for base in models
    ]
    assert torch.equal(*outputs)
    assert len(set(outputs[0][0, 4:].tolist())) > 3


def test_shape_and_parameters_are_those_asked_for() -> None:
    grown = grow(build(), ALL)
    config = grown.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (5, 80, 100)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size) == (
        12,
        6,
        8,
        64,
    )
    attention = 80 * 8 * (2 * 12 + 2 * 6)
    layer = attention + 3 * 80 * 100 + 2 * 80
    assert sum(p.numel() for p in grown.parameters()) == 5 * layer + 80 + 2 * 64 * 80
    assert cost_parameters(grown) == 5 * layer + 80 + 64 * 80
    tied = grow(build(tie_word_embeddings=True), ALL)
    assert cost_parameters(tied) == sum(p.numel() for p in tied.parameters()) == 5 * layer + 80 + 64 * 80
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "billions"), [("0.5B", 0.49), ("1.5B", 1.54), ("7B", 6.74), ("13B", 13.0)])
def test_named_shapes_have_their_size(name: str, billions: float) -> None:
    model = build(tie_word_embeddings=True, head_dim=64, num_key_value_heads=2)
    with torch.device("meta"):
        grown = LlamaForCausalLM(command._grown_config(model, SHAPES[name]))
    assert sum(p.numel() for p in grown.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert grown.config.head_dim == 64


def test_key_value_heads_are_raised_where_the_model_has_more() -> None:
    model = build(num_attention_heads=4, num_key_value_heads=4)
    grown = grow(model, Shape(heads=14, kv_heads=2))
    assert grown.config.num_key_value_heads == 7
    assert torch.allclose(logits(grown.float()), logits(model.float()), atol=1e-5)


@pytest.mark.parametrize("ratio", [0.2, 0.1, 0.01])
def test_cost_ratio(ratio: float) -> None:
    base, small = build(num_key_value_heads=4, dtype=torch.float32), build(num_hidden_layers=1, dtype=torch.float32)
    grown = grow_to_cost_ratio(base, small, ratio)
    assert cost_parameters(small) / cost_parameters(grown) == pytest.approx(ratio, rel=0.05)
    assert torch.allclose(logits(grown), logits(base), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    model = build()
    with pytest.raises(ValueError, match="num_hidden_layers=1 is less than the model's 2"):
        grow(model, Shape(layers=1))
    with pytest.raises(ValueError, match="already"):
        grow_to_cost_ratio(model, model, 2.0)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be grown"):
        grow(tiny.tiny_model("gpt2"), ALL)
    with pytest.raises(ValueError, match="'width=3' is neither"):
        parse_shape("layers=3,width=3")
    assert parse_shape("layers=3,kv_heads=2") == Shape(layers=3, kv_heads=2)


def test_command_writes_a_folder_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen2", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    spelt = "layers=5,hidden=80,heads=12,kv_heads=6,feed_forward=100,vocab=64"
    command.main([str(tmp_path / "model"), "--shape", spelt, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert captured.out == "" and "5 layers, hidden 80, heads 12/6 of 8" in captured.err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    small = ["--cost-ratio", "0.2", "--small", str(tmp_path / "model")]
    command.main([str(tmp_path / "model"), *small, "--out", str(tmp_path / "ratio")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ratio").eval()
    assert cost_parameters(model) / cost_parameters(loaded) == pytest.approx(0.2, rel=0.05)
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "model"), "--cost-ratio", "0.2", "--out", str(tmp_path / "none")])
