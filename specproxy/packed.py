"""One forward for several caches: their windows stand behind each other in a single sequence.

All but attention works token by token, so that windows of any sizes may share a pass over the weights; keys and values
are written to the cache that each token belongs to, and attention runs cache by cache (`specproxy.attention`). Knows
nothing of models or roles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specproxy.cache import RaggedCache, Window

__all__ = ["PackedCache", "PackedWindow"]


class PackedWindow:
    """Windows that make up one sequence, in order.

    Args:
        windows: of one forward, each of its own cache.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = list(windows)

    @property
    def positions(self) -> Tensor:
        """int64 [1, T], position of every token."""
        return torch.cat([window.positions.flatten() for window in self.windows])[None]

    def split(self, states: Tensor) -> Iterator[Tensor]:
        """Each window's part [count, H, size, D] of a sequence's states [1, H, T, D]; views."""
        sizes = [window.count * window.size for window in self.windows]
        for window, part in zip(self.windows, states[0].split(sizes, dim=1), strict=True):
            yield part.unflatten(1, (window.count, window.size)).transpose(0, 1)

    @staticmethod
    def join(parts: Sequence[Tensor]) -> Tensor:
        """The sequence [1, T, ...] of the windows' parts [count, size, ...]."""
        return torch.cat([part.flatten(0, 1) for part in parts])[None]


class PackedCache(Cache):
    """Transformers' cache of a packed forward: it hands every window's part to the window's own cache.

    Args:
        caches: in the order of the windows.
        window: of the forward.
    """

    def __init__(self, caches: Sequence[RaggedCache], window: PackedWindow) -> None:
        super().__init__(layers=[])
        self._caches, self._window = list(caches), window

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Write a layer's keys and values [1, H_kv, T, D]; returns the caches' buffers, as tuples for our attention."""
        states = zip(self._window.split(key_states), self._window.split(value_states), strict=True)
        buffers = [cache.update(*part, layer_idx) for cache, part in zip(self._caches, states, strict=True)]
        keys, values = zip(*buffers, strict=True)
        return keys, values
