"""Shapes of token trees: which node follows which, and how many tokens a tree is worth. Knows no models or tensors.

A window that equality decides (greedy decoding, and `coupled`) may hold a tree of drafts instead of a chain: node 0,
the root, is the token that is already decided, and every other node is a guess of the token after its parent. The rank
of a node says which guess: 0 is what the drafter would have drafted in a chain, r its r-th best alternative.

Nodes are numbered level by level, and within a level those that have children come first, so that a level, and what of
it has to be expanded, are ranges. Bit j of a node's word is set where node j is the node itself or an ancestor, which
is what `specproxy_kernels.ragged_attention` calls an ancestor word.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["MAX_TREE_TOKENS", "TYPICAL_RANK_ACCEPTANCE", "TreeShape"]

MAX_TREE_TOKENS = 63  # drafted nodes: with the root, the bits of an ancestor word

#: How often the target's token is the drafter's best guess, its second best, ...: of a small Python trio, sampled at
#: temperature 1 under `coupled`. Good enough to shape a tree by where nothing is known yet; `benchmarks/trees.py`
#: measures it (the embedded Python trio: 0.60, 0.16, 0.09, 0.04, 0.02, ...).
TYPICAL_RANK_ACCEPTANCE = (0.54, 0.18, 0.08, 0.05, 0.03, 0.02, 0.015, 0.01)


@dataclass(frozen=True)
class TreeShape:
    """A static topology; equal shapes are equal and hash alike.

    Args:
        parents: of every node, -1 for the root; in the order that the module describes.
        ranks: of every node among the guesses of its parent; 0 for the root.

    Raises:
        ValueError: nodes out of order, siblings of one rank, or too many nodes.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        count = len(self.parents)
        if count != len(self.ranks) or count == 0 or self.parents[0] != -1 or self.ranks[0] != 0:
            raise ValueError("a tree has one rank a node, and a root of parent -1 and rank 0 that stands first.")
        if count > MAX_TREE_TOKENS + 1:
            raise ValueError(f"a tree of {count - 1} drafted nodes: at most {MAX_TREE_TOKENS} fit.")
        if any(not 0 <= parent < node for node, parent in enumerate(self.parents) if node):
            raise ValueError(f"parents={self.parents}: every node but the root follows its parent.")
        if len(set(zip(self.parents, self.ranks, strict=True))) < count or min(self.ranks) < 0:
            raise ValueError(f"ranks={self.ranks}: siblings have ranks of their own, from 0 on.")
        order = [(depth, node not in set(self.parents)) for node, depth in enumerate(self.depths)]
        if order != sorted(order):
            raise ValueError(f"parents={self.parents}: nodes stand level by level, those with children first.")

    @classmethod
    def chain(cls, depth: int) -> TreeShape:
        """The tree that drafts as a chain does: the best guess of every node, `depth` times."""
        return cls(tuple(range(-1, depth)), (0,) * (depth + 1))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> TreeShape:
        """The smallest tree that holds nodes given by the ranks on the way to them from the root."""
        nodes = {tuple(path[:length]) for path in paths for length in range(len(path) + 1)} | {()}
        inner = {path[:-1] for path in nodes if path}
        order = sorted(nodes, key=lambda path: (len(path), path not in inner, path))
        number = {path: node for node, path in enumerate(order)}
        parents = tuple(number[path[:-1]] if path else -1 for path in order)
        return cls(parents, tuple(path[-1] if path else 0 for path in order))

    @classmethod
    def best_tree(cls, rank_acceptance: Sequence[float], num_nodes: int, depth: int) -> TreeShape:
        """The tree of `num_nodes` drafted nodes, at most `depth` deep, that accepts most tokens.

        A node is reached with the product of the rank acceptances on the way to it, where levels are independent. No
        child is likelier than its parent, so that taking the likeliest node again and again is optimal.

        Args:
            rank_acceptance: probability that the target's token is the guess of each rank; they sum to at most 1.
            num_nodes: drafted nodes, at most 63; fewer where the depth and the ranks leave no more.
            depth: levels of drafts.

        Source of the idea: Chen et al. 2024 (Sequoia), arXiv 2402.12374, section 4.1.
        """
        if not 0 <= num_nodes <= MAX_TREE_TOKENS:
            raise ValueError(f"num_nodes={num_nodes}: a tree has 0 to {MAX_TREE_TOKENS} drafted nodes.")
        ranks = sorted(range(len(rank_acceptance)), key=lambda rank: (-rank_acceptance[rank], rank))
        chances = [rank_acceptance[rank] for rank in ranks]
        paths: list[tuple[int, ...]] = []
        # (-chance, depth, path as places in `ranks`, chance of the parent): the likeliest first, of equals the shallow.
        waiting: list[tuple[float, int, tuple[int, ...], float]] = []

        def offer(parent: tuple[int, ...], place: int, chance: float) -> None:
            if len(parent) < depth and place < len(ranks):
                heapq.heappush(waiting, (-chance * chances[place], len(parent) + 1, (*parent, place), chance))

        offer((), 0, 1.0)
        while waiting and len(paths) < num_nodes:
            negative, _, path, above = heapq.heappop(waiting)
            paths.append(path)
            offer(path[:-1], path[-1] + 1, above)
            offer(path, 0, -negative)
        return cls.from_paths([tuple(ranks[place] for place in path) for path in paths])

    def cut(self, depth: int) -> TreeShape:
        """The tree without what is deeper than `depth`."""
        return self if depth >= self.depth else self.from_paths([path for path in self.paths if len(path) <= depth])

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def num_drafts(self) -> int:
        """Drafted nodes: all but the root."""
        return len(self) - 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of every node; 0 for the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def depth(self) -> int:
        """Of the deepest node: tokens that a cycle may accept."""
        return max(self.depths)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Ancestor words of the nodes, as signed 64-bit integers."""
        words: list[int] = []
        for node, parent in enumerate(self.parents):
            words.append(1 << node | (words[parent] if node else 0))
        return tuple(word - (word >> 63 << 64) for word in words)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Of every node, the ranks on the way to it from the root."""
        paths: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            paths.append((*paths[parent], rank))
        return tuple(paths)

    @cached_property
    def levels(self) -> tuple[range, ...]:
        """The nodes of every depth."""
        starts = [self.depths.index(depth) for depth in range(self.depth + 1)]
        return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True))

    @cached_property
    def expanded(self) -> tuple[range, ...]:
        """The nodes of every level that have children: those of the last one have none."""
        inner = set(self.parents)
        return tuple(range(level.start, level.start + sum(node in inner for node in level)) for level in self.levels)

    def children(self, node: int) -> tuple[int, ...]:
        """Of a node, by rank."""
        found = [child for child, parent in enumerate(self.parents) if parent == node]
        return tuple(sorted(found, key=lambda child: self.ranks[child]))

    @cached_property
    def best_children(self) -> tuple[int, ...]:
        """Of every node, its child of the best rank; 0 where it has none."""
        return tuple(next(iter(self.children(node)), 0) for node in range(len(self)))

    def expected_tokens(self, rank_acceptance: Sequence[float]) -> float:
        """Tokens a cycle, the one that no guess foretold included, where levels are independent.

        Args:
            rank_acceptance: as in `best_tree`; ranks beyond its end are never right.
        """
        reached = [1.0]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            reached.append(reached[parent] * (rank_acceptance[rank] if rank < len(rank_acceptance) else 0.0))
        return sum(reached)
