"""Processes that hold one base together (tensor parallelism), and what they have to agree on.

Every process runs the same loop, with a pair of its own. The base's forwards are collective, so all must give it the
same tokens in the same windows. Draws are made everywhere and might part by rounding: the first process decides, and
tells the others. Knows nothing of rows or laws.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as distributed
from torch import Tensor, nn

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """A group of processes; alone, where there is none.

    Args:
        group: of `torch.distributed`, or None.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._first = 0 if group is None else distributed.get_global_rank(group, 0)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The processes that a model's weights are sharded over."""
        for weight in model.parameters():
            mesh = getattr(weight, "device_mesh", None)  # of a DTensor
            if mesh is not None and mesh.size() > 1:
                return cls(mesh.get_group() if mesh.ndim == 1 else mesh["tp"].get_group())
        return cls()

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self._group is None

    def agree(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, of the same shape and dtype in all of them."""
        if self._group is None:
            return tensor
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, self._first, group=self._group)
        return tensor

    def agree_on(self, value: T) -> T:
        """The first process's value, which can be pickled."""
        if self._group is None:
            return value
        values = [value]
        distributed.broadcast_object_list(values, self._first, group=self._group)
        return values[0]
