"""The embedded trio: small real models that come with the package and load without a network."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specproxy.errors import ConfigurationError

__all__ = ["example_prompts", "load", "tasks"]

_MODELS = Path(__file__).parent / "models"


@cache
def _description() -> dict[str, Any]:
    description: dict[str, Any] = json.loads((_MODELS / "demo.json").read_text(encoding="utf-8"))
    return description


def tasks() -> list[str]:
    """Tasks that an embedded expert exists for."""
    return list(_description()["tasks"])


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
    entry = _task(task)
    models = {
        role: AutoModelForCausalLM.from_pretrained(_MODELS / folder, dtype=dtype or torch.float32).to(device or "cpu")
        for role, folder in (("base", "base"), ("expert", entry["expert"]), ("anti_expert", "anti-expert"))
    }
    tokenizer = AutoTokenizer.from_pretrained(_MODELS / "tokenizer")
    return {**models, "tokenizer": tokenizer, "alpha": float(entry["alpha"])}
