"""Shapes of token trees: order, words, and the best tree against an exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch

from specproxy.nodes import Nodes
from specproxy.tree import MAX_TREE_TOKENS, TYPICAL_RANK_ACCEPTANCE, TreeShape

FORK = TreeShape.from_paths([(0, 0, 1), (1, 0), (0, 2), (2,)])
RANKS = (0.5, 0.3, 0.1, 0.05)


def test_nodes_stand_level_by_level_with_parents_first():
    assert FORK.paths == ((), (0,), (1,), (2,), (0, 0), (0, 2), (1, 0), (0, 0, 1))
    assert FORK.parents == (-1, 0, 0, 0, 1, 1, 2, 4)
    assert FORK.levels == (range(1), range(1, 4), range(4, 7), range(7, 8))
    assert FORK.expanded == (range(1), range(1, 3), range(4, 5), range(7, 7))
    assert (FORK.num_drafts, FORK.depth, len(FORK)) == (7, 3, 8)
    assert FORK.children(0) == (1, 2, 3) and FORK.children(1) == (4, 5) and FORK.children(7) == ()
    # A leaf of a smaller rank comes behind a parent of a larger one.
    assert TreeShape.from_paths([(0,), (1, 0)]).paths == ((), (1,), (0,), (1, 0))


def test_words_hold_a_node_and_its_ancestors():
    for node, word in enumerate(FORK.words):
        path = FORK.paths[node]
        ancestors = {other for other in range(len(FORK)) if path[: len(FORK.paths[other])] == FORK.paths[other]}
        assert {bit for bit in range(64) if word >> bit & 1} == ancestors
    last = TreeShape.chain(63).words[-1]
    assert last == -1 and torch.tensor(TreeShape.chain(63).words).dtype == torch.int64


@pytest.mark.parametrize("depth", range(4))
def test_a_cut_keeps_what_is_shallow(depth):
    cut = FORK.cut(depth)
    assert set(cut.paths) == {path for path in FORK.paths if len(path) <= depth}
    assert cut.depth == depth


def all_trees(num_nodes: int, depth: int, width: int) -> set[frozenset[tuple[int, ...]]]:
    """Every set of so many paths that holds every prefix of its own."""
    trees: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(num_nodes):
        trees = {
            tree | {path}
            for tree in trees
            for parent in [(), *tree]
            for path in ((*parent, rank) for rank in range(width))
            if len(path) <= depth and path not in tree
        }
    return trees


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("ranks", [(0.6, 0.3), (0.5, 0.3, 0.1), (0.3, 0.5, 0.0), (0.4, 0.4, 0.2)])
def test_the_best_tree_is_the_best_of_all(ranks, depth):
    for num_nodes in range(1, 5):
        best = (
            max(
                TreeShape.from_paths(list(tree)).expected_tokens(ranks)
                for tree in all_trees(num_nodes, depth, len(ranks))
            )
            if all_trees(num_nodes, depth, len(ranks))
            else None
        )
        shape = TreeShape.best_tree(ranks, num_nodes, depth)
        if best is None:
            assert shape.num_drafts < num_nodes
        else:
            assert shape.num_drafts == num_nodes and shape.depth <= depth
            assert shape.expected_tokens(ranks) == pytest.approx(best)


def test_expected_tokens_by_simulation():
    generator = torch.Generator().manual_seed(0)
    shape = TreeShape.best_tree(RANKS, 12, 4)
    chances = torch.tensor([*RANKS, 1 - sum(RANKS)])
    draws = torch.multinomial(chances, 4 * 20_000, replacement=True, generator=generator).view(-1, 4).tolist()
    accepted = 0
    for ranks in draws:
        node = 0
        for rank in ranks:
            found = [child for child in shape.children(node) if shape.ranks[child] == rank]
            if not found:
                break
            node, accepted = found[0], accepted + 1
    assert 1 + accepted / len(draws) == pytest.approx(shape.expected_tokens(RANKS), abs=0.03)
    assert shape.expected_tokens(RANKS) > TreeShape.chain(4).expected_tokens(RANKS)


def test_a_chain_is_what_one_rank_leaves():
    assert TreeShape.best_tree((0.7,), 5, 8) == TreeShape.chain(5)
    assert TreeShape.best_tree((0.7,), 9, 4) == TreeShape.chain(4)
    assert TreeShape.best_tree(RANKS, 63, 0) == TreeShape.chain(0) == TreeShape.best_tree(RANKS, 0, 4)
    assert hash(TreeShape.chain(3)) == hash(TreeShape.from_paths([(0, 0, 0)]))
    assert TreeShape.chain(4).expected_tokens((0.5,)) == 1 + 0.5 + 0.25 + 0.125 + 0.0625


def test_typical_ranks_are_a_law():
    assert list(TYPICAL_RANK_ACCEPTANCE) == sorted(TYPICAL_RANK_ACCEPTANCE, reverse=True)
    assert sum(TYPICAL_RANK_ACCEPTANCE) < 1


@pytest.mark.parametrize(
    ("parents", "ranks", "message"),
    [
        ((0,), (0,), "root of parent -1"),
        ((-1, 0), (0,), "one rank a node"),
        ((-1, 1), (0, 0), "follows its parent"),
        ((-1, 0, 0), (0, 1, 1), "siblings"),
        ((-1, 0, 1, 0), (0, 0, 0, 1), "level by level"),
        ((-1, 0, 0, 2), (0, 0, 1, 0), "with children first"),
        (tuple(range(-1, 64)), (0,) * 65, "at most 63"),
    ],
)
def test_what_is_no_tree(parents, ranks, message):
    with pytest.raises(ValueError, match=message):
        TreeShape(parents, ranks)


def test_too_many_nodes():
    with pytest.raises(ValueError, match="num_nodes=64"):
        TreeShape.best_tree(RANKS, MAX_TREE_TOKENS + 1, 4)


@pytest.mark.parametrize("shape", [FORK, TreeShape.chain(1), TreeShape.best_tree(RANKS, 63, 5)], ids=len)
def test_tensors_say_what_the_shape_says(shape):
    nodes = Nodes(shape, torch.device("cpu"))
    for node, depth in itertools.product(range(len(shape)), range(shape.depth + 1)):
        ancestor = int(nodes.paths[node, depth])
        if depth <= shape.depths[node]:
            assert shape.paths[ancestor] == shape.paths[node][:depth]
    inner = [node for level in shape.expanded for node in level]
    assert [inner[place] for place in nodes.place[inner].tolist()] == inner
    assert [node for node in range(len(shape)) if not nodes.is_leaf[node]] == inner
    for depth, level in enumerate(shape.levels[1:]):
        above = shape.expanded[depth]
        for node, pick in zip(level, nodes.picks[depth].tolist(), strict=True):
            parent, rank = divmod(pick, nodes.num_guesses[depth])
            assert (above.start + parent, rank) == (shape.parents[node], shape.ranks[node])
