"""From options to a loaded model, and quiet while libraries are at work. Knows nothing of prompts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

from specproxy.commands.arguments import DeviceOptions, ModelOptions
from specproxy.errors import ConfigurationError, SpecProxyError
from specproxy.model import ProxyTunedModel

__all__ = ["load", "quiet"]


def load(models: ModelOptions, where: DeviceOptions) -> ProxyTunedModel:
    """The trio that the options name.

    Raises:
        SpecProxyError: where it cannot be loaded or the device cannot be used.
    """
    dtype = getattr(torch, where.dtype) if where.dtype else None
    try:
        if where.device is not None:
            torch.empty(0, device=where.device)  # fails here rather than half way through loading
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device={where.device} cannot be used: {str(error).splitlines()[0]}") from error
    if models.task is not None:
        return ProxyTunedModel.demo(models.task, device=where.device, dtype=dtype)
    if "anti_expert" not in models.names:
        print("note: without --anti-expert the expert's logits are added as they are.", file=sys.stderr)
    try:
        return ProxyTunedModel.from_pretrained(
            **models.names, dtype=dtype, device_map=where.device, progress=sys.stderr.isatty()
        )
    except SpecProxyError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"the models could not be loaded: {error}") from error


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
