"""From options to a loaded model, and quiet while libraries are at work. Knows nothing of prompts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from specproxy import demo
from specproxy.commands.arguments import ROLES, DeviceOptions, DraftingOptions, ModelOptions
from specproxy.errors import ConfigurationError, SpecProxyError
from specproxy.model import ProxyTunedModel
from specproxy.state import ASSISTANT
from specproxy.suffix import LookupCorpus

__all__ = ["load", "quiet"]


def load(models: ModelOptions, where: DeviceOptions, drafting: DraftingOptions | None = None) -> ProxyTunedModel:
    """The models that the options name.

    Args:
        models: which.
        where: they run.
        drafting: who drafts, in a command that lets one choose; a corpus becomes the model's.

    Raises:
        SpecProxyError: where they cannot be loaded, the device cannot be used, or who is to draft is not named.
        OSError: a file of the corpus cannot be read.
    """
    texts: list[str] = []
    if drafting is not None:
        _check_drafter(models, drafting)
        texts = [_read(path) for path in drafting.corpus or []]
    model = _load(models, where)
    if texts:
        if model.tokenizer is None:
            raise ConfigurationError(f"no tokenizer was found beside --base={models.base}; a corpus needs one.")
        ids = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        # Twice as much room as there is text, since a corpus may forget half of what it has room for.
        model.corpus = LookupCorpus(max(2, 2 * sum(map(len, ids))))
        for text in ids:
            model.corpus.add(text)
    return model


def _load(models: ModelOptions, where: DeviceOptions) -> ProxyTunedModel:
    dtype = getattr(torch, where.dtype) if where.dtype else None
    try:
        if where.device is not None:
            torch.empty(0, device=where.device)  # fails here rather than half way through loading
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device={where.device} cannot be used: {str(error).splitlines()[0]}") from error
    if models.task is not None and where.num_shards == 1:
        return ProxyTunedModel.demo(models.task, device=where.device, dtype=dtype, assistant=models.assistant)
    if "anti_expert" not in models.names:
        print("note: without --anti-expert the expert's logits are added as they are.", file=sys.stderr)
    names = models.names
    if models.task is not None:
        names, dtype = {**names, "alpha": demo.alpha(models.task)}, dtype or torch.float32
    if where.num_shards > 1:
        names |= _sharded(where.num_shards, [role for role in (*ROLES, ASSISTANT) if role in names])
    try:
        return ProxyTunedModel.from_pretrained(
            **names, dtype=dtype, device_map=where.device, progress=sys.stderr.isatty()
        )
    except SpecProxyError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"the models could not be loaded: {error}") from error


def _check_drafter(models: ModelOptions, drafting: DraftingOptions) -> None:
    """An assistant that is named drafts, and one that drafts is named; and a corpus is looked up in."""
    if drafting.drafter == ASSISTANT and models.assistant is None:
        raise ConfigurationError(f"--drafter={ASSISTANT} needs a model that drafts; name one by --assistant.")
    if drafting.drafter != ASSISTANT and models.assistant is not None:
        raise ConfigurationError(f"--assistant={models.assistant} drafts under --drafter={ASSISTANT} only; add it.")
    looks_up = drafting.drafter in ("lookup", "cascade") or (drafting.drafter is None and drafting.drafts == "auto")
    if drafting.corpus and not looks_up:
        raise ConfigurationError(f"--corpus={drafting.corpus[0]} serves lookup; add --drafter=lookup, or cascade.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--corpus={path} is not UTF-8 text: {error}.") from error


def _sharded(count: int, roles: list[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a base sharded over processes, each of which has small models of its own."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    own = {f"{role}_kwargs": {"device_map": device} for role in roles}
    return {**own, "base_kwargs": {"distributed_config": DistributedConfig(tp_size=count)}}


@contextlib.contextmanager
def quiet(to_stderr: bool) -> Iterator[None]:
    """Silence what Transformers reports on the way; with `to_stderr`, keep standard output free of anybody's prints."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
