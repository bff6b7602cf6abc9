"""Capture and replay on the CPU, under the contract of a CUDA graph.

While a stretch of a program is recorded every operation runs, and is kept with the very tensors that it read and the
memory that it wrote; a replay runs the operations once more, from and into the same memory, and none of the program.
What a CUDA graph would bake in is baked in here: Python numbers, shapes, the addresses of tensors. What breaks a
capture raises `CaptureError`: reading a value on the host, building a tensor from Python data, a shape that follows
values. Kernels of the interpreter are recorded as launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["CaptureError", "TapeBackend"]

T = TypeVar("T")
Action = Callable[[], None]

_HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_FROM_HOST = ("lift_fresh", "lift_fresh_copy")
_BY_VALUE = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
    "bincount",
)


class CaptureError(RuntimeError):
    """An operation that the capture of a CUDA graph would refuse."""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Records every operation while entered; `replay` runs them again."""

    def __init__(self, allows_constants: bool = False) -> None:
        super().__init__()
        self.allows_constants = allows_constants
        self.actions: list[Action] = []
        self.num_launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _HOST_READS:
            raise CaptureError(f"{func} reads a value on the host")
        if name in _FROM_HOST and not self.allows_constants:
            raise CaptureError(f"{func} builds a tensor from Python data")
        if name in _BY_VALUE or (name == "index" and any(t.dtype == torch.bool for t in _tensors(args[1]))):
            raise CaptureError(f"{func} has a shape that follows values")
        out = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if tensor.numel() and _memory(tensor) not in given]
        writes = func._schema.is_mutable
        if name.startswith(("empty", "new_empty")):
            return out  # memory alone
        if made or writes:
            self.actions.append(lambda: self._again(func, args, kwargs, made))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        again = [tensor for tensor in _tensors(out) if tensor.numel() and _memory(tensor) not in given]
        for old, new in zip(made, again, strict=True):
            old.copy_(new)

    def launch(self, run: Action) -> None:
        """Run a kernel, and keep it."""
        with _disable_current_modes():
            run()
        self.actions.append(run)
        self.num_launches += 1

    def replay(self) -> None:
        """Everything once more."""
        for action in self.actions:
            action()


@contextmanager
def _recording(tape: Tape) -> Iterator[None]:
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        tape.launch(lambda: run(kernel, *args, **kwargs))

    def refuse(tensor: Tensor) -> Any:
        raise CaptureError("tolist() reads values on the host")

    with pytest.MonkeyPatch.context() as monkeypatch, tape:
        monkeypatch.setattr(InterpretedFunction, "run", launch)
        monkeypatch.setattr(Tensor, "tolist", refuse)
        monkeypatch.setattr(Tensor, "numpy", refuse)
        yield


class TapeBackend:
    """`specproxy.graphs.Backend` by tapes, which it keeps.

    Args:
        allows_constants: whether tensors may be built from Python data, which a replay then finds as they were.
    """

    def __init__(self, allows_constants: bool = False) -> None:
        self.allows_constants = allows_constants
        self.tapes: list[Tape] = []
        self.replays = 0

    def capture(self, run: Callable[[], T], reset: Action) -> tuple[Action, T]:
        """Record one run; a warm-up run comes before it, as for a graph."""
        run()
        reset()
        tape = Tape(self.allows_constants)
        with _recording(tape):
            result = run()
        reset()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, result
