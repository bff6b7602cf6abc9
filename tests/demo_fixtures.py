"""A tiny random trio in the layout of the embedded one, and in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specproxy import demo
from specproxy.model import ProxyTunedModel

EXAMPLE_PROMPTS = {"arithmetic": "Add 2 and 3:", "python": "def add("}


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<|end|>": 0} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny trio on disk, in the layout of the embedded one."""
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "anti-expert", "expert-arithmetic", "expert-python")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(byte_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(path / name)
        byte_tokenizer.save_pretrained(path / name)
    byte_tokenizer.save_pretrained(path / "tokenizer")
    tasks = {
        task: {"expert": f"expert-{task}", "alpha": 0.5, "example_prompts": [text]}
        for task, text in EXAMPLE_PROMPTS.items()
    }
    (path / "demo.json").write_text(json.dumps({"tasks": tasks}))
    return path


@pytest.fixture
def tiny_demo(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny trio in place of the embedded one."""
    monkeypatch.setattr(demo, "_MODELS", demo_folder)
    demo._description.cache_clear()
    yield ProxyTunedModel.demo
    demo._description.cache_clear()
