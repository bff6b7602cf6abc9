"""The embedded trio: small real models that come with the package and load without a network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specproxy.errors import ConfigurationError

__all__ = ["alpha", "example_prompts", "folders", "load", "tasks"]

_MODELS = Path(__file__).parent / "models"


@cache
def _description() -> dict[str, Any]:
    description: dict[str, Any] = json.loads((_MODELS / "demo.json").read_text(encoding="utf-8"))
    return description


def tasks() -> list[str]:
    """Tasks that an embedded expert exists for."""
    return list(_description()["tasks"])


def alpha(task: str) -> float:
    """Strength that suits a task.

    Raises:
        ConfigurationError: where there is no such task.
    """
    return float(_task(task)["alpha"])


def example_prompts(task: str) -> list[str]:
    """Prompts that show a task.

    Raises:
        ConfigurationError: where there is no such task.
    """
    prompts: list[str] = _task(task)["example_prompts"]
    return list(prompts)


def _task(task: str) -> dict[str, Any]:
    if task not in _description()["tasks"]:
        raise ConfigurationError(f"demo={task!r} is not an embedded task; use one of {', '.join(tasks())}.")
    entry: dict[str, Any] = _description()["tasks"][task]
    return entry


def folders(task: str) -> dict[str, str]:
    """Where the trio of a task lies: base, expert, anti_expert and tokenizer.

    Raises:
        ConfigurationError: where there is no such task.
    """
    names = {"base": "base", "expert": _task(task)["expert"], "anti_expert": "anti-expert", "tokenizer": "tokenizer"}
    return {role: str(_MODELS / name) for role, name in names.items()}


def load(task: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Load an embedded trio.

    Args:
        task: one of `tasks()`.
        device: where the models go; the CPU by default.
        dtype: of the weights; float32 by default (they are stored in bf16, which few CPUs compute in).

    Returns:
        The arguments of `ProxyTunedModel`: base, expert, anti_expert, tokenizer, alpha.

    Raises:
        ConfigurationError: where there is no such task.
    """
    names = folders(task)
    tokenizer = AutoTokenizer.from_pretrained(names.pop("tokenizer"))
    models = {
        role: AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32).to(device or "cpu")
        for role, name in names.items()
    }
    return {**models, "tokenizer": tokenizer, "alpha": alpha(task)}
