"""Models and tokenizers from folders or a hub: what `ProxyTunedModel.from_pretrained` loads, role by role.

Knows which names stand for adapters; nothing of whether models fit together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from specproxy.adapters import adapter_base, adapter_origin, is_adapter, load_adapter, refuse_adapter
from specproxy.errors import ConfigurationError
from specproxy.state import ANTI_EXPERT, ASSISTANT, BASE, EXPERT

__all__ = ["find_tokenizer", "load_models", "load_tokenizers"]

_NUM_COMPARED = 4  # matrices of two models that tell whether they are one
# Of their entries, in bfloat16: one that was rounded to float16 before is another in up to a sixteenth of all cases.
_SHARE_IN_COMMON = 0.9


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
        ConfigurationError: an adapter that cannot be used, or that was trained on a model of other weights than the
            anti-expert's.
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
            untuned = models[ANTI_EXPERT if ANTI_EXPERT in models else EXPERT]
            weights = untuned.state_dict()  # by the names that they have without the adapter
            models[EXPERT] = load_adapter(untuned, adapter, own.get(EXPERT) or {})
            if ANTI_EXPERT in models:
                _check_origin(adapter, weights, names[ANTI_EXPERT])
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


def _check_origin(adapter: str, own: Mapping[str, Tensor], name: str) -> None:
    """Hold the model that an adapter has been put on against the one it was trained on, by a few of their weights.

    Nothing is fetched for it: where that model is not on this machine, or names its weights otherwise, there is no
    telling.

    Args:
        adapter: a folder or hub id.
        own: weights of the model that it is on.
        name: that model's.

    Raises:
        ConfigurationError: the weights differ.
    """
    origin, revision = adapter_origin(adapter)
    file = None if origin is None else _weights_on_this_machine(origin, revision)
    if file is None:
        return
    own = {key: value for key, value in own.items() if value.is_floating_point() and not value.is_meta}
    with safe_open(file, framework="pt") as weights:
        shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in own.keys() & set(weights.keys())}
        # The smallest matrices: vectors are often what they were when they were made.
        matrices = sorted(
            (math.prod(shape), key) for key, shape in shapes.items() if len(shape) == 2 and shape == own[key].shape
        )
        for _, key in matrices[:_NUM_COMPARED]:
            if not _are_one(own[key].cpu(), weights.get_tensor(key)):
                raise ConfigurationError(
                    f"expert={adapter} is an adapter trained on {origin!r}, and anti_expert={name} has other weights "
                    f"({key}): give anti_expert={origin}. To use it there all the same, load both and give the peft "
                    "model."
                )


def _are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one but for the precisions in which they were kept on their way here."""
    return bool((a.bfloat16() == b.bfloat16()).float().mean() > _SHARE_IN_COMMON)


def _weights_on_this_machine(name: str, revision: str | None) -> str | None:
    """A file of a model's weights, the first where there are several; None where none is in a folder or the cache."""

    def found(file: str) -> str | None:
        try:
            path: str | None = cached_file(name, file, revision=revision, local_files_only=True)
        except (OSError, ValueError):
            return None
        return path

    whole = found("model.safetensors")
    index = None if whole is not None else found("model.safetensors.index.json")
    if index is None:
        return whole
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return found(min(files))


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
