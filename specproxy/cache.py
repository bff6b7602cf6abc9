"""Static key-value buffers with a length per row: rollback is one integer a row, and no padding is ever needed.

`RaggedCache` plugs into Transformers as its `Cache`: a layer's `update` writes a window's keys and values at each
row's own length and returns the buffer up to the longest row (where kernels run, the whole buffer, so that no shape
follows the text). What lies past a row's length is stale and must be masked by the reader (`specproxy.attention`). This
module knows nothing of models, roles or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specproxy.nodes import Nodes
from specproxy_kernels import compact_window, write_window
from specproxy_kernels.dispatch import kernel_path

__all__ = ["RaggedCache", "Window"]

_GROWTH = 64  # buffers grow by half their size, and by at least this many positions


@dataclass
class Window:
    """Where one forward's tokens go: `count` rows from `first`, `size` tokens each, behind `lengths`.

    A token tree may be read in several forwards: `nodes` start .. start + size of it then, whose slots are their
    numbers, while their positions go by depth.

    Args:
        first, count: the rows of the buffers that take part.
        size: tokens per row in this forward.
        lengths: int64 [count], keys before the window, on the device.
        host_lengths: the same on the host.
        nodes: of a tree, on the device; None for a chain.
        start: the first node; 0 for a chain.
        biases: additive masks of this forward, made once and shared by its layers.
        num_attended: attention calls that this forward has made.
    """

    first: int
    count: int
    size: int
    lengths: Tensor
    host_lengths: list[int]
    nodes: Nodes | None = None
    start: int = 0
    biases: dict[tuple[int | None, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    num_attended: int = 0

    def __post_init__(self) -> None:
        self.longest = max(self.host_lengths)
        self.is_uniform = min(self.host_lengths) == self.longest
        self.begin = self.lengths + self.start if self.start else self.lengths  # slot of the first token
        self._index: tuple[Tensor, Tensor] | None = None

    @property
    def extent(self) -> int:
        """Keys of the window, up to the last token of this forward."""
        return self.start + self.size

    @property
    def positions(self) -> Tensor:
        """int64 [count, size], position of every token."""
        if self.nodes is not None:
            return self.lengths[:, None] + self.nodes.depth[self.start : self.extent]
        return self.lengths[:, None] + torch.arange(self.size, device=self.lengths.device)

    @property
    def ancestors(self) -> Tensor | None:
        """int64 [count, extent], words of the window's keys; None for a chain."""
        return None if self.nodes is None else self.nodes.words[: self.extent].expand(self.count, -1)

    def scatter_index(self) -> tuple[Tensor, Tensor]:
        """Buffer rows [count, 1] and slots [count, size] of every token."""
        if self._index is None:
            rows = torch.arange(self.first, self.first + self.count, device=self.lengths.device)
            self._index = rows[:, None], self.begin[:, None] + torch.arange(self.size, device=self.lengths.device)
        return self._index


class _RaggedLayer(CacheLayerMixin):
    """Buffers of one layer, [max_rows, H_kv, capacity, D]."""

    is_sliding = False

    def __init__(self, owner: RaggedCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, states: Tensor) -> Tensor:
        # Zeros, not empty: what is masked must still be finite, since 0 * NaN is NaN.
        shape = (self.owner.max_rows, states.shape[1], self.owner.capacity, states.shape[3])
        return states.new_zeros(shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        window = self.owner.window
        assert window is not None, "a ragged cache is written between begin() and the end of a forward only"
        if kernel_path(key_states.device) == "triton":
            rows = slice(window.first, window.first + window.count)
            keys, values = self.keys[rows], self.values[rows]
            write_window(key_states, value_states, keys, values, window.begin.to(keys.device))
            return keys, values
        return self._write(self.keys, key_states, window), self._write(self.values, value_states, window)

    @staticmethod
    def _write(buffer: Tensor, states: Tensor, window: Window) -> Tensor:
        rows = slice(window.first, window.first + window.count)
        end = window.longest + window.extent
        if window.is_uniform:
            buffer[rows, :, window.longest + window.start : end] = states
        else:
            row_index, slots = window.scatter_index()
            buffer.transpose(1, 2)[row_index.to(buffer.device), slots.to(buffer.device)] = states.transpose(1, 2)
        return buffer[rows, :, :end]

    def grow(self, capacity: int) -> None:
        """Lengthen the buffers, keeping what they hold."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, capacity - self.keys.shape[2]))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, capacity - self.values.shape[2]))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.owner.window.longest if self.owner.window is not None else 0

    def get_max_length(self) -> int:
        return self.owner.capacity


class RaggedCache(Cache):
    """The cache of one model for up to `max_rows` sequences, each with its own length.

    Args:
        max_rows: rows of the buffers.
        device: where the lengths live (those of the positions handed to the model).
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.capacity = 0
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.host_lengths = [0] * max_rows
        self.window: Window | None = None

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in every row."""
        if length > self.capacity:
            capacity = max(length, self.capacity + max(_GROWTH, self.capacity // 2))
            for layer in self.layers:
                layer.grow(capacity)
            self.capacity = capacity  # last: where memory runs out on the way, growing may be tried again

    def begin(
        self, first: int, count: int, size: int, offset: int | list[int] | Tensor = 0, nodes: Nodes | None = None
    ) -> Window:
        """Place the next forward: `size` tokens a row for rows first .. first + count, `offset` past their lengths.

        Args:
            first, count, size: as in `Window`.
            offset: of all rows, or of each; where it is a tensor, which the host does not read, the caller has reserved
                what is needed. With `nodes` the first node's number.
            nodes: of a tree.
        """
        rows = slice(first, first + count)
        lengths, host_lengths = self.lengths[rows], self.host_lengths[rows]
        if nodes is not None:
            assert isinstance(offset, int), "nodes are counted by the host"
            if offset + size == 1:  # the root alone is a chain
                nodes = None
            window = Window(first, count, size, lengths, host_lengths, nodes, offset)
            # Room for all of it: a path is moved from wherever it stands.
            self.reserve(window.longest + max(window.extent, 0 if nodes is None else len(nodes.shape)))
        elif isinstance(offset, Tensor):
            window = Window(first, count, size, lengths + offset, host_lengths)
        else:
            if isinstance(offset, list):
                host_lengths = [length + further for length, further in zip(host_lengths, offset, strict=True)]
                lengths = lengths + torch.tensor(offset).to(lengths.device)
            elif offset:
                host_lengths, lengths = [length + offset for length in host_lengths], lengths + offset
            window = Window(first, count, size, lengths, host_lengths)
            self.reserve(window.longest + size)
        self.window = window
        return window

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values [n, H_kv, T, D] at the window; returns its buffers up to the longest row."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_RaggedLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def set_lengths(self, first: int, lengths: list[int]) -> None:
        """Set the lengths of rows from `first` on: after a prefill, or to empty them."""
        rows = slice(first, first + len(lengths))
        self.host_lengths[rows] = lengths
        self.lengths[rows] = torch.tensor(lengths, dtype=torch.long).to(self.lengths.device)

    def advance(self, steps: Tensor) -> None:
        """Keep `steps` int64 [n] more positions of the first n rows; all behind them is rolled back.

        On the device only: `follow` tells the host before the next forward.
        """
        self.lengths[: steps.shape[0]] += steps.to(self.lengths.device)

    def follow(self, steps: list[int]) -> None:
        """Repeat an `advance` on the host's copy of the lengths."""
        self.host_lengths[: len(steps)] = [a + b for a, b in zip(self.host_lengths, steps, strict=False)]

    def compact(self, slots: Tensor) -> None:
        """Move a path through the last window, int64 [n, P] slots of rows 0 .. n - 1, to the window's beginning.

        Lengths stay: `advance` keeps what has been moved.
        """
        count = slots.shape[0]
        moves_on_host = kernel_path(slots.device) == "torch"
        if moves_on_host and bool((slots == torch.arange(slots.shape[1], device=slots.device)).all()):
            return
        for layer in self.layers:
            keys, values = layer.keys[:count], layer.values[:count]
            compact_window(keys, values, self.lengths[:count].to(keys.device), slots.to(keys.device))

    def move(self, source: int, target: int, length: int | None = None) -> None:
        """Copy a row's keys, values and length into another row; with a length, as many leading positions alone."""
        length = self.host_lengths[source] if length is None else length
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :length] = buffer[source, :, :length]
        self.set_lengths(target, [length])

    def export(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of a row's leading keys and values, [H_kv, length, D] per layer."""
        return [(layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()) for layer in self.layers]

    def restore(self, row: int, copies: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Begin a row with the leading `length` positions of what `export` has made; that is its length then."""
        self.reserve(length)
        for layer, (keys, values) in zip(self.layers, copies, strict=True):
            layer.keys[row, :, :length] = keys[:, :length]
            layer.values[row, :, :length] = values[:, :length]
        self.set_lengths(row, [length])

    def empty(self, first: int, last: int) -> None:
        """Forget the lengths of rows first .. last - 1, which nobody owns any longer."""
        self.lengths[first:last] = 0
        self.host_lengths[first:last] = [0] * (last - first)

    def clear(self, row: int) -> None:
        """Zero a row whose values may not be finite, so that nothing masked can spread."""
        for layer in self.layers:
            layer.keys[row] = 0
            layer.values[row] = 0
