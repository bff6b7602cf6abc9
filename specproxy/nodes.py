"""A tree's shape as tensors of one device: what forwards, drafters and the walk through a tree index by.

They are made once, outside any capture, and must live as long as what was captured with them. Knows no models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specproxy.tree import TreeShape

__all__ = ["Nodes"]


class Nodes:
    """Tensors of a shape of N nodes, int64 but for `is_leaf`.

    Args:
        shape: the tree.
        device: of the tensors.
    """

    def __init__(self, shape: TreeShape, device: torch.device) -> None:
        def tensor(values: object, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        paths = [[0] * (shape.depth + 1) for _ in shape.parents]
        for node, parent in enumerate(shape.parents):
            if node:
                paths[node] = list(paths[parent])
                paths[node][shape.depths[node]] = node
        inner = [node for level in shape.expanded for node in level]
        self.shape = shape
        self.words = tensor(shape.words)  # [N], ancestor words
        self.depth = tensor(shape.depths)  # [N]
        self.parent = tensor(shape.parents)  # [N]
        self.number = torch.arange(len(shape), device=device)  # [N]
        self.paths = tensor(paths)  # [N, D + 1], the nodes on the way to a node by depth; 0 behind it
        self.is_leaf = tensor([node not in inner for node in range(len(shape))], torch.bool)  # [N]
        self.place = tensor([inner.index(node) if node in inner else 0 for node in range(len(shape))])  # [N], of inner
        self.num_guesses: list[int] = []  # per level but the last, guesses that its nodes make: k
        self.picks: list[Tensor] = []  # per level but the first [n], which of the m * k guesses above each node is
        for above, level in zip(shape.expanded, shape.levels[1:], strict=False):
            count = 1 + max(shape.ranks[node] for node in level)
            self.num_guesses.append(count)
            self.picks.append(tensor([(shape.parents[n] - above.start) * count + shape.ranks[n] for n in level]))
