"""The attention function that Transformers calls during our forwards, and the loan of a caller's models.

Registered under a name for which Transformers has no mask function, so that it hands over `attention_mask=None` and
this function masks by row length, causality and sliding window itself: with the fused kernel where kernels run, else
with grouped scaled-dot-product attention under a bias. The state of a forward arrives as a keyword argument of the
model's own `forward`: there is no global. Knows nothing of roles or tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from specproxy.cache import Window
from specproxy.errors import SpecProxyError, UnsupportedModelError
from specproxy.packed import PackedWindow
from specproxy_kernels import ragged_attention, window_attention, window_bias
from specproxy_kernels.dispatch import kernel_path

__all__ = ["WINDOW_KEYWORD", "borrowed"]

WINDOW_KEYWORD = "specproxy_window"
_ATTENTION_NAME = "specproxy_window"
_IMPLEMENTATION = "_attn_implementation_internal"  # where a configuration keeps the name of its attention
# Beyond it a prompt that starts an empty cache is plain causal attention, for which torch has the better kernel.
_MAX_KERNEL_WINDOW = 64
# What some architectures add to their attention: sinks, relative positions, sparse selections.
_UNSUPPORTED = ("s_aux", "position_bias", "indices", "block_indices")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, [B, H, T, D] queries over [B, H_kv, S, D] buffers; returns [B, T, H, D].

    In a packed forward `key` and `value` are tuples of such buffers, one per window.
    """
    window: Window | PackedWindow | None = kwargs.get(WINDOW_KEYWORD)
    if window is None:
        raise SpecProxyError(
            "the model was called from elsewhere while specproxy generates with it: wait until generate() returns, "
            "or give specproxy a copy of its own."
        )
    further = {name: kwargs.get(name) for name in _UNSUPPORTED} | {"attention_mask": attention_mask}
    unsupported = [name for name, value in further.items() if value is not None]
    if unsupported:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for {', '.join(unsupported)} in its attention, which ragged windows do not "
            "support; use an architecture of plain causal or sliding-window attention."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    further_arguments = (scaling, sliding_window, softcap)
    if isinstance(window, PackedWindow):
        parts = zip(window.windows, window.split(query), key, value, strict=True)
        return window.join([_attend_window(*part, *further_arguments) for part in parts]), None
    return _attend_window(window, query, key, value, *further_arguments), None


def _attend_window(
    window: Window,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """`_attend` of one cache's window."""
    window.num_attended += 1
    if kernel_path(query.device) == "triton":
        return _attend_fused(window, query, key, value, scaling, sliding_window, softcap)
    num_keys = key.shape[2]
    limited = sliding_window is not None and num_keys > sliding_window
    is_chain = window.nodes is None
    if is_chain and window.size == 1 and window.is_uniform:
        if limited:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]  # type: ignore[operator]
        return window_attention(query, key, value, None, scaling=scaling, softcap=softcap)
    if is_chain and window.longest == 0 and not limited:
        return window_attention(query, key, value, None, scaling=scaling, softcap=softcap, causal=True)
    groups = query.shape[1] // key.shape[1]
    name = (sliding_window if limited else None, groups, num_keys, query.dtype)
    bias = window.biases.get(name)
    if bias is None:
        lengths = window.lengths.to(query.device)
        reach = sliding_window if limited else None
        ancestors = None if is_chain else window.ancestors.to(query.device)  # type: ignore[union-attr]
        bias = window_bias(lengths, window.size, num_keys, groups, query.dtype, reach, ancestors)
        window.biases[name] = bias
    return window_attention(query, key, value, bias.to(query.device), scaling=scaling, softcap=softcap)


def _attend_fused(
    window: Window,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """`_attend` over whole buffers [B, H_kv, capacity, D], which the kernel reads up to each row's own length."""
    is_prompt = window.longest == 0 and window.size > _MAX_KERNEL_WINDOW
    if is_prompt and softcap is None and (sliding_window is None or window.size <= sliding_window):
        keys, values = keys[:, :, : window.size], values[:, :, : window.size]
        return window_attention(query, keys, values, None, scaling=scaling, causal=True)
    ancestors = window.ancestors
    return ragged_attention(
        query,
        keys,
        values,
        window.lengths.to(query.device),
        scaling=scaling,
        softcap=softcap,
        sliding_window=sliding_window,
        ancestors=None if ancestors is None else ancestors.to(query.device),
    )


AttentionInterface.register(_ATTENTION_NAME, _attend)


@dataclass
class _Held:
    """An attribute of a caller's object, switched for as long as somebody borrows a model that has the object."""

    owner: Any
    before: Any
    holders: int = 0


class _Loan:
    """What is switched in one model while it is borrowed.

    Models may have a configuration or a module in common. So it is not the model that remembers how they were, but a
    register of all that is switched: what the first borrower found is put back by the last.
    """

    def __init__(self, model: nn.Module) -> None:
        self.borrowers = 0
        self._names: set[tuple[int, str]] = set()
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, _IMPLEMENTATION):
                self._hold(config, _IMPLEMENTATION, _ATTENTION_NAME)
            self._hold(module, "training", False)

    def _hold(self, owner: Any, attribute: str, value: Any) -> None:
        name = id(owner), attribute
        if name in self._names:
            return
        held = _held.get(name)
        if held is None:
            if getattr(owner, attribute) == value:
                return
            held = _held[name] = _Held(owner, getattr(owner, attribute))
            setattr(owner, attribute, value)
        held.holders += 1
        self._names.add(name)

    def end(self) -> None:
        """Put back what nobody else has borrowed."""
        for name in self._names:
            held = _held[name]
            held.holders -= 1
            if held.holders == 0:
                setattr(held.owner, name[1], held.before)
                del _held[name]


_held: dict[tuple[int, str], _Held] = {}
_loans: dict[int, _Loan] = {}
_loans_lock = threading.Lock()


@contextmanager
def borrowed(models: Iterable[nn.Module]) -> Iterator[None]:
    """Switch models to window attention and evaluation mode; the last borrower's exit puts everything back.

    Safe to nest and to enter from several threads: loans are counted per model, and per object that models share.
    """
    distinct = list({id(model): model for model in models}.values())
    with _loans_lock:
        for model in distinct:
            loan = _loans.get(id(model))
            if loan is None:
                loan = _loans[id(model)] = _Loan(model)
            loan.borrowers += 1
    try:
        yield
    finally:
        with _loans_lock:
            for model in distinct:
                loan = _loans[id(model)]
                loan.borrowers -= 1
                if loan.borrowers == 0:
                    del _loans[id(model)]
                    loan.end()
