"""Models and tokenizers from folders or a hub: what `ProxyTunedModel.from_pretrained` loads, role by role.

Knows which names stand for adapters; nothing of whether models fit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from specproxy.adapters import adapter_base, is_adapter, load_adapter, refuse_adapter
from specproxy.state import ANTI_EXPERT, ASSISTANT, BASE, EXPERT

__all__ = ["find_tokenizer", "load_models", "load_tokenizers"]


def load_models(
    names: Mapping[str, str], shared: Mapping[str, Any], own: Mapping[str, Mapping[str, Any] | None], progress: bool
) -> dict[str, Any]:
    """Load one model per role.

    Args:
        names: per role, a folder or hub id. The expert's may be an adapter: it goes on the anti-expert, or, without
            one, on the model that it names itself.
        shared: arguments of `AutoModelForCausalLM.from_pretrained` for all roles.
        own: further ones per role, which override the shared ones; an adapter's are of `PeftModel.from_pretrained`.
        progress: whether to show one progress bar on stderr.

    Raises:
        ConfigurationError: an adapter that cannot be used.
        OSError, ValueError: Transformers' own, for a folder that it cannot load.
    """
    folders = dict(names)
    if ASSISTANT in names:
        refuse_adapter(names[ASSISTANT], ASSISTANT)
    adapter = folders.pop(EXPERT) if is_adapter(names[EXPERT]) else None
    if adapter is not None and ANTI_EXPERT not in names:
        folders[EXPERT] = adapter_base(adapter)
    models: dict[str, Any] = {}
    with _quiet_transformers():
        for role in track(folders, "Loading models", console=Console(stderr=True), disable=not progress):
            further = {} if adapter is not None and role == EXPERT else own.get(role) or {}
            models[role] = AutoModelForCausalLM.from_pretrained(folders[role], **{**shared, **further})
        if adapter is not None:
            untuned = models.get(ANTI_EXPERT, models.get(EXPERT))
            models[EXPERT] = load_adapter(untuned, adapter, own.get(EXPERT) or {})
    return models


def load_tokenizers(names: Mapping[str, str], tokenizer: Any = None) -> dict[str, Any]:
    """The tokenizer beside every role's model, None where there is none.

    Args:
        names: per role, a folder or hub id.
        tokenizer: in place of what lies beside the base: a tokenizer, or a folder or hub id of one.

    Raises:
        OSError, ValueError: Transformers' own, for a tokenizer asked for that it cannot load.
    """
    tokenizers = {role: find_tokenizer(name) for role, name in names.items()}
    if tokenizer is not None:
        tokenizers[BASE] = AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return tokenizers


def find_tokenizer(name: str) -> Any:
    """The tokenizer beside a model, or None where there is none.

    For some architectures Transformers makes one of special tokens alone where it finds no file; that is none.

    Args:
        name: a folder or hub id.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    return tokenizer if ordinary else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without Transformers' own progress bars, of which there would be one per model."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
