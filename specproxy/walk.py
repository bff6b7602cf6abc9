"""The walk through a scored token tree: from the root to the child that equals the target's token, as far as one does.

At every node the target's token is drawn as per-step decoding would draw it there: by the same operation, with the
noise of its position and the prefix that the path makes. So every law holds as it does without drafts. All rows walk
together, a level at a time. What stays is a chain: the path's tokens, its logits by depth, and in every cache its keys
and values behind the row's length.

Source of the idea: Miao et al. 2024 (SpecInfer), arXiv 2305.09781, section 4.3; shared noise fixes the target's tokens
here as greedy decoding does there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specproxy.nodes import Nodes
from specproxy.state import EXPERT, DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits
from specproxy_kernels import NoiseStream, WarpParameters, take_token, verify_window

__all__ = ["walk"]


def walk(
    state: DecodeState, runners: TrioRunners, noise: NoiseStream, draft: Draft, window: WindowLogits
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept the drafts of a path, and draw the token behind it.

    Args:
        state: the rows in flight.
        runners: of the trio; in their caches the path is moved to where a chain would stand.
        noise: of this cycle.
        draft: a tree; left as the chain that was taken.
        window: its scores; left as those of that chain.

    Returns:
        num_accepted, next_token and status, as in `specproxy_kernels.verify_window`.
    """
    tree = draft.tree
    assert tree is not None and state.equality_decides, "trees are for what equality decides"
    path = _Path(state, runners.nodes(tree, state.device), draft, window)
    # On the device alone, a walk goes down to the last level whether or not some row still moves. So does one beside
    # other processes, whose paths may end elsewhere until the first one's is agreed on.
    reads_host = (path.misses_leaves or state.is_dense) and runners.ranks.is_alone
    parameters = state.warp(tree.depth + 1)
    num_accepted = torch.zeros_like(state.start)
    token, status = num_accepted, num_accepted.int()
    is_moving = num_accepted == 0
    waits = ~is_moving  # at a leaf whose logits the expert has yet to give
    for depth in range(tree.depth + 1):
        drawn = path.draw(num_accepted, depth, parameters, noise)
        token, status = torch.where(is_moving, drawn[0], token), torch.where(is_moving, drawn[1], status)
        if depth == tree.depth:
            break
        is_moving = path.step(token, is_moving & (status == 0) & (draft.num_drafts > depth))
        num_accepted = num_accepted + is_moving
        parameters = take_token(parameters, token, is_moving)
        if path.misses_leaves:
            reached = is_moving & path.is_at_leaf
            waits, is_moving = waits | reached, is_moving & ~reached
        if reads_host and not bool(is_moving.any()):
            break
    draft.nodes = torch.stack(path.nodes[1:], dim=1)
    draft.tokens = torch.stack(path.tokens, dim=1)
    slots = runners.ranks.agree(torch.stack(path.nodes, dim=1))  # the base's cache is everybody's
    for runner in runners:
        runner.cache.compact(slots)
    if path.misses_leaves and bool(waits.any()):
        path.run_leaves(runners, num_accepted, waits)
        parameters = state.constrain(parameters, draft.tokens)
        drawn = path.draw_at(num_accepted, parameters, noise)
        token, status = torch.where(waits, drawn[0], token), torch.where(waits, drawn[1], status)
    window.take(path.window)
    return num_accepted, token, status


class _Path:
    """Where every row stands, and the chain behind it.

    Args:
        state: the rows in flight.
        nodes: of the tree, on the state's device.
        draft, scored: the tree and its scores.
    """

    def __init__(self, state: DecodeState, nodes: Nodes, draft: Draft, scored: WindowLogits) -> None:
        self._state, self._nodes, self._draft, self._scored = state, nodes, draft, scored
        self.misses_leaves = scored.by_role[EXPERT].shape[1] < len(nodes.shape)
        self.nodes = [torch.zeros_like(state.start)]  # [B] each, by depth; where a row has stopped, the depth itself
        self.tokens: list[Tensor] = []  # [B] each, by depth, from 1 on
        self.window = WindowLogits({}, scored.pair_roles, state.strengths(nodes.shape.depth + 1), nodes.shape.depth + 1)
        self._nothing = draft.tokens[:, :0]

    @property
    def is_at_leaf(self) -> Tensor:
        """bool [B]."""
        return self._nodes.is_leaf[self.nodes[-1]]

    def step(self, token: Tensor, may_move: Tensor) -> Tensor:
        """Go to the child that equals a token [B], where a row may move and there is one; returns who moved, [B]."""
        is_child = (self._nodes.parent[1:] == self.nodes[-1][:, None]) & (self._draft.tokens == token[:, None])
        has_moved = may_move & is_child.any(-1)
        child = (is_child * self._nodes.number[1:]).sum(-1)  # siblings differ: there is one at most
        # The slot of its own depth is where a row that has stopped leaves everything in place.
        self.nodes.append(child.masked_fill(~has_moved, len(self.nodes)))
        self.tokens.append(token * has_moved)
        return has_moved

    def _enter(self) -> None:
        """Add the logits of the present nodes to the path's window."""
        node = self.nodes[-1]
        for role, logits in self._scored.by_role.items():
            place = self._nodes.place[node] if role == EXPERT and self.misses_leaves else node
            here = _row_at(logits, place)
            known = self.window.by_role.get(role)
            self.window.by_role[role] = here if known is None else torch.cat([known, here], dim=1)

    def draw(
        self, num_accepted: Tensor, depth: int, parameters: WarpParameters, noise: NoiseStream
    ) -> tuple[Tensor, Tensor]:
        """The target's token, and status, [B] each, of the rows that have come to a depth, at their nodes there.

        The parameters' prefix holds the path; their allowed tokens are those of the window's positions.
        """
        self._enter()
        tokens = torch.stack(self.tokens, dim=1) if self.tokens else self._nothing
        parameters = self._state.constrain(parameters, tokens)
        if self._state.is_dense:
            self.window.resolve(self._state, tokens, num_accepted)
        return self.draw_at(torch.full_like(self._state.start, depth), parameters, noise)

    def draw_at(self, depth: Tensor, parameters: WarpParameters, noise: NoiseStream) -> tuple[Tensor, Tensor]:
        """Likewise at a depth [B] of each row's own, whose logits are there."""
        if self._state.is_dense:
            base, pairs = _row_at(self.window.processed, depth), []
        else:
            base = _row_at(self.window.base, depth)
            pairs = [
                pair._replace(
                    expert=_row_at(pair.expert, depth),
                    anti_expert=None if pair.anti_expert is None else _row_at(pair.anti_expert, depth),
                    alpha=pair.alpha.gather(1, depth[:, None]),
                )
                for pair in self.window.pairs()
            ]
        if parameters.allowed is not None and parameters.allowed.shape[1] > 1:
            parameters = replace(parameters, allowed=_row_at(parameters.allowed, depth))
        own_noise = noise.at(depth, self._nodes.shape.depth)
        no_drafts = torch.zeros_like(depth)
        _, token, status = verify_window(
            "coupled", base, pairs, self._nothing, no_drafts, None, parameters, own_noise, self._state.vocab_size
        )
        return token, status

    def run_leaves(self, runners: TrioRunners, num_accepted: Tensor, waits: Tensor) -> None:
        """Let the expert read the leaves that rows wait at, behind the path that its cache now holds as a chain."""
        self._enter()
        tokens = torch.stack(self.tokens, dim=1).gather(1, (num_accepted[:, None] - 1).clamp(min=0))
        # A row that does not wait writes behind its path, where nothing is kept.
        offset = (num_accepted + ~waits).tolist()
        logits = runners.expert.forward(tokens, offset=offset).to(self._state.device)
        known = self.window.by_role[EXPERT]
        place = num_accepted[:, None, None].expand(-1, 1, known.shape[2])
        leaf = torch.where(waits[:, None, None], logits, known.gather(1, place))
        self.window.by_role[EXPERT] = known.scatter(1, place, leaf)


def _row_at(values: Tensor, row: Tensor) -> Tensor:
    """[B, 1, V], one row [B] of each of [B, n, V]."""
    return values.gather(1, row[:, None, None].expand(-1, 1, values.shape[2]))
