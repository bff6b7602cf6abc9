"""The expert drafts a token tree: level by level, one forward over all nodes of a level.

The guesses of a node are the tokens with the largest warped logits + noise of its depth, so that its first one is the
draft of a chain there, and under `coupled` meets the target's own draw.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from specproxy.policy import Plan
from specproxy.state import EXPERT, DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy_kernels import (
    NoiseStream,
    WarpParameters,
    combine_logits,
    kernel_path,
    sample_candidates,
    unpack_allowed_tokens,
)

__all__ = ["TreeDrafter"]


class TreeDrafter:
    """Fills `plan.tree` with the expert's guesses, and leaves its logits at the nodes that it has run.

    Those are all nodes where asking which leaf is reached would synchronise, or Python sees every position; else the
    nodes that have children.
    """

    name = "tree"

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Guess the tokens of every node; see `Drafter`."""
        tree = plan.tree
        assert tree is not None and state.equality_decides, "trees are for what equality decides"
        runs_leaves = kernel_path(state.device) == "triton" or state.is_dense
        nodes, own_nodes = (runners.nodes(tree, device) for device in (state.device, runners.expert.device))
        parameters = state.warp(tree.depth + 1)
        noise.expect(tree.depth + 1)  # the target's draws read the same noise, down to the last level
        tokens = state.pending[EXPERT][:, None]  # int64 [B, nodes so far]
        is_possible = torch.ones_like(tokens, dtype=torch.bool)  # likewise; kept for processors alone
        logits: list[Tensor] = []
        for depth, (level, inner) in enumerate(zip(tree.levels, tree.expanded, strict=True)):
            run = level if runs_leaves else inner
            if run:
                here = tokens[:, run.start : run.stop]
                logits.append(runners.expert.forward(here, offset=run.start, nodes=own_nodes).to(state.device))
            if inner:
                prefix = tokens[:, nodes.paths[inner.start : inner.stop, 1 : depth + 1]]  # [B, m, depth]
                scores = logits[-1][:, : len(inner)]
                if state.has_processors:
                    scores = _processed(state, scores, prefix, is_possible[:, inner.start : inner.stop])
                if state.has_grammars:
                    scores = _constrained(state, parameters, scores, prefix)
                count, pick = nodes.num_guesses[depth], nodes.picks[depth]
                guesses = sample_candidates(scores, parameters, prefix, noise, state.vocab_size, count)  # [B, m, k]
                tokens = torch.cat([tokens, guesses.flatten(1)[:, pick]], dim=1)
                if state.has_processors:
                    has_mass = scores.gather(-1, guesses) > -inf
                    has_mass &= is_possible[:, inner.start : inner.stop, None]
                    is_possible = torch.cat([is_possible, has_mass.flatten(1)[:, pick]], dim=1)
        expert_logits = torch.cat(logits, dim=1)  # [B, nodes run, V_expert]
        return Draft(tokens[:, 1:], state.num_drafts(tree.depth), None, expert_logits, tree)


def _processed(state: DecodeState, logits: Tensor, prefix: Tensor, is_possible: Tensor) -> Tensor:
    """Logits [B, m, V] of nodes behind the rows' processors, which see no prefix that they have ruled out.

    Args:
        state: the rows in flight.
        logits: the expert's, raw.
        prefix: int64 [B, m, depth], the drafts before each node.
        is_possible: bool [B, m], whether each node's path has mass.
    """
    combined = combine_logits(logits, [], state.vocab_size, state.shared_ids)[0]
    depth = prefix.shape[2]
    counts = depth - (~is_possible).long()  # a row is left alone where its drafts do not reach
    processed = [
        state.process(combined[:, node : node + 1], prefix[:, node], depth, counts[:, node])
        for node in range(prefix.shape[1])
    ]
    return torch.cat(processed, dim=1)


def _constrained(state: DecodeState, parameters: WarpParameters, logits: Tensor, prefix: Tensor) -> Tensor:
    """Logits [B, m, V] of nodes, without the tokens that a row's grammar rules out behind each.

    Args:
        state: the rows in flight.
        parameters: of the window.
        logits: [B, m, >= V].
        prefix: int64 [B, m, depth], the drafts before each node.
    """
    masks = []
    for node in range(prefix.shape[1]):
        words = state.constrain(parameters, prefix[:, node]).allowed
        assert words is not None, "a grammar allows some tokens"
        masks.append(words[:, -1])
    allowed = unpack_allowed_tokens(torch.stack(masks, dim=1), state.vocab_size)
    return logits[..., : state.vocab_size].masked_fill(~allowed, -inf)
