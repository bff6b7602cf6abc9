"""A LoRA adapter on chosen tokens of a forward: tuned and untuned model from one set of weights.

While a `LoraSwitch` is lent, peft's own layers stand aside (each passes on its base layer) and a hook behind them adds

    y[tokens] + scaling * B(A(x[tokens]))

for the tokens that the thread's current forward names: all of them, none, or a part, so that one pass over the weights
serves both models. peft's own way to mix adapters in a batch indexes rows by Python lists in every layer, which neither
a CUDA graph nor a shared sequence can hold. Nothing is left behind in the caller's model.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from specproxy.errors import ConfigurationError, SpecProxyError, UnsupportedModelError

__all__ = [
    "EVERY_TOKEN",
    "LoraSwitch",
    "adapter_base",
    "adapter_origin",
    "is_adapted",
    "is_adapter",
    "load_adapter",
    "refuse_adapter",
    "shape_adapter",
    "without_adapter",
]

EVERY_TOKEN = slice(None)
_MERGE = "merge_and_unload() a copy and give that as a model of its own"


def is_adapted(model: Any) -> bool:
    """Whether a model is a peft model; told by its interface, since peft need not be installed."""
    return isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def without_adapter(model: Any, role: str) -> Any:
    """The Transformers model inside a peft model, its adapter layers in place; any other model as it is.

    Args:
        model: of the role.
        role: for messages.

    Raises:
        UnsupportedModelError: the adapter is not in the layers but in front of them (prompt and prefix tuning).
    """
    if not is_adapted(model):
        return model
    for config in model.peft_config.values():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{role}: {_kind(config)} puts learned tokens before the prompt, which is not supported; use LoRA."
            )
    return model.get_base_model()


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id holds an adapter rather than a model."""
    try:
        return find_adapter_config_file(name) is not None
    except OSError:
        return False  # loading it as a model will tell what is wrong


def refuse_adapter(name: str, role: str) -> None:
    """Hold a role to whole models.

    Args:
        name: a folder or hub id.
        role: for the message.

    Raises:
        ConfigurationError: it is an adapter.
    """
    if is_adapter(name):
        raise ConfigurationError(f"{role}={name} is an adapter, which the {role} may not be; {_MERGE}.")


def adapter_base(name: str) -> str:
    """The model that an adapter says it was trained on.

    Args:
        name: a folder or hub id of an adapter.

    Raises:
        ConfigurationError: it names none, or peft is not installed.
    """
    base = adapter_origin(name)[0]
    if base is None:
        raise ConfigurationError(f"expert={name} is an adapter that names no base model; give it as anti_expert.")
    return base


def adapter_origin(name: str) -> tuple[str | None, str | None]:
    """The model that an adapter says it was trained on, and the model's revision; None for what it does not say.

    Args:
        name: a folder or hub id of an adapter.

    Raises:
        ConfigurationError: peft is not installed.
    """
    config = _peft().PeftConfig.from_pretrained(name)
    return config.base_model_name_or_path or None, config.revision or None


def load_adapter(model: Any, name: str, arguments: Mapping[str, Any]) -> Any:
    """A model with a saved adapter in place, which shares its weights.

    Args:
        model: the model that the adapter belongs to; its layers are wrapped in place.
        name: a folder or hub id of an adapter.
        arguments: of `PeftModel.from_pretrained`.

    Raises:
        ConfigurationError: the adapter does not fit the model, or peft is not installed.
    """
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(model, name, **arguments)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        own = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"expert={name} is an adapter that does not fit {type(model).__name__}, of {model.config._name_or_path!r}: "
            f"{own} Give the model it was trained on as anti_expert."
        ) from error


def shape_adapter(model: Any, name: str) -> Any:
    """A model on the meta device with an adapter's layers in place, from the adapter's configuration alone.

    Raises:
        ValueError: peft's own, where the model has no such layers.
        ConfigurationError: peft is not installed.
    """
    peft = _peft()
    return peft.get_peft_model(model, peft.PeftConfig.from_pretrained(name), low_cpu_mem_usage=True)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "the expert is an adapter, which needs peft: pip install 'specproxy[lora]', or give a merged model."
        ) from error
    return peft


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


class LoraSwitch:
    """The active LoRA adapter of a peft model whose base model plays a part too.

    Args:
        model: a `peft.PeftModel` with one active adapter.
        role: of the tuned model, for messages.

    Raises:
        ConfigurationError: several adapters are active, or they are merged.
        UnsupportedModelError: an adapter that changes more than linear layers by low-rank matrices.
    """

    def __init__(self, model: Any, role: str) -> None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ConfigurationError(
                f"{role} has {len(active)} active adapters ({', '.join(active)}); activate one, by set_adapter(name)."
            )
        self.adapter: str = active[0]
        self.model = without_adapter(model, role)
        self._role = role
        self._check(model.peft_config[self.adapter])

    def _check(self, config: Any) -> None:
        kind = _kind(config)
        if kind != "LORA":
            raise UnsupportedModelError(f"{self._role}: adapters of type {kind} cannot share weights; {_MERGE}.")
        whole = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
        if whole or getattr(config, "bias", "none") != "none":
            what = f"{whole[0]}={getattr(config, whole[0])!r}" if whole else f"bias={config.bias!r}"
            raise UnsupportedModelError(
                f"{self._role}: {what} trains weights of the base model itself, which cannot be shared then; {_MERGE}."
            )
        found = 0
        for path, layer in self.model.named_modules():
            if not hasattr(layer, "_get_available_adapters") or self.adapter not in layer._get_available_adapters():
                continue
            down = getattr(layer, "lora_A", {})
            is_plain = self.adapter in down and isinstance(down[self.adapter], nn.Linear)
            if not is_plain or self.adapter in getattr(layer, "lora_variant", {}):
                raise UnsupportedModelError(
                    f"{self._role}: the adapter's layer {path} ({type(layer).__name__}) is no plain low-rank change of "
                    f"a linear layer; {_MERGE}."
                )
            found += 1
        if not found:
            raise ConfigurationError(f"{self._role}: the adapter {self.adapter!r} has no layer in its base model.")

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Put the hook in place of peft's own; the last borrower's exit puts everything back.

        Raises:
            ConfigurationError: the caller has merged an adapter into the weights.
        """
        with _lock:
            installed = _installed.get(id(self.model))
            if installed is None:
                installed = _Installed(self.model, self._role)
                _installed[id(self.model)] = installed
            installed.borrowers += 1
        try:
            yield
        finally:
            with _lock:
                installed.borrowers -= 1
                if installed.borrowers == 0:
                    del _installed[id(self.model)]
                    installed.remove()

    @contextmanager
    def applied(self, tokens: slice | None) -> Iterator[None]:
        """In this thread's forwards, adapt these tokens of the flattened batch: `EVERY_TOKEN`, none or a stretch.

        Args:
            tokens: of the one sequence where it is a stretch.
        """
        local = _installed[id(self.model)].local
        before = getattr(local, "applied", None)
        local.applied = self.adapter, tokens
        try:
            yield
        finally:
            local.applied = before


class _Installed:
    """Hooks behind the LoRA layers of one model, and how those layers were before."""

    def __init__(self, model: nn.Module, role: str) -> None:
        self.borrowers = 0
        self.local = threading.local()
        layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        if any(layer.merged for layer in layers):
            raise ConfigurationError(f"{role}: the adapter is merged into its base model; call unmerge_adapter().")
        self._flags = [(layer, layer._disable_adapters) for layer in layers]
        self._handles = [layer.register_forward_hook(self._adapt) for layer in layers]
        for layer in layers:
            layer._disable_adapters = True

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for layer, flag in self._flags:
            layer._disable_adapters = flag

    def _adapt(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        applied = getattr(self.local, "applied", None)
        if applied is None:
            raise SpecProxyError(
                "the model was called from elsewhere while specproxy generates with it: wait until generate() returns, "
                "or give specproxy a copy of its own."
            )
        adapter, tokens = applied
        if tokens is None or adapter not in layer.lora_A:
            return None
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        states = inputs[0] if tokens == EVERY_TOKEN else inputs[0][..., tokens, :]
        states = layer.lora_dropout[adapter](states.to(down.weight.dtype))
        change = up(down(states)) * layer.scaling[adapter]
        if tokens == EVERY_TOKEN:
            return (output + change).to(output.dtype)
        untouched = output[..., : tokens.start, :]
        return torch.cat([untouched, (output[..., tokens, :] + change).to(output.dtype)], dim=-2)


_installed: dict[int, _Installed] = {}
_lock = threading.Lock()
