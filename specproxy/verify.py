"""Scoring a window: one forward of the base and one of every further model over all W positions.

The anti-expert never steps: it proposes nothing. Where the expert has drafted, its logits come from drafting, and its
step at the bonus position is run by `bonus_step`, only where some row reaches that position; where others have drafted,
the expert too runs once over the whole window. The window of a token tree holds all its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from specproxy.state import BASE, EXPERT, DecodeState, Draft
from specproxy.trio import Pair, TrioRunners
from specproxy_kernels import LogitPair, combine_logits, pair_at, warp_law

__all__ = ["WindowLogits", "bonus_step", "score_window"]


@dataclass
class WindowLogits:
    """Raw logits of a window, per role [B, W, .]; a drafting expert's reach as far as it has stepped, G or W.

    `combined`, `processed` and `scores`, [B, <= W, V], are filled by `resolve` where Python needs to see them.
    """

    by_role: dict[str, Tensor]
    pair_roles: list[Pair]
    strengths: Tensor  # [B, W, pairs]
    window: int
    combined: Tensor = field(default_factory=lambda: torch.empty(0))
    processed: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def base(self) -> Tensor:
        """The base's logits [B, W, V_base]."""
        return self.by_role[BASE]

    @property
    def num_scored(self) -> int:
        """Positions at which every model's logits are there."""
        return self.by_role[EXPERT].shape[1]

    def pairs(self) -> list[LogitPair]:
        """The pairs of the logit arithmetic, as far as the expert's logits reach."""
        return [pair.term(self.by_role, self.strengths[..., i]) for i, pair in enumerate(self.pair_roles)]

    def resolve(self, state: DecodeState, drafts: Tensor, num_drafts: Tensor | None = None) -> None:
        """Combine, process and warp the positions that have been scored since the last call."""
        first, last = (self.combined.shape[1] if self.combined.ndim == 3 else 0), self.num_scored
        if first == last and first > 0:
            return
        here = slice(first, last)
        pairs = [pair_at(pair, here) for pair in self.pairs()]
        combined, bad = combine_logits(self.base[:, here], pairs, state.vocab_size, state.shared_ids)
        repairs = torch.tensor([row.law.removes_invalid for row in state.rows], device=combined.device)
        combined = combined.masked_fill((bad & ~repairs[:, None])[..., None], torch.nan)
        processed = state.process(combined, drafts, first, num_drafts)
        position = torch.arange(first, last, device=drafts.device).expand(len(state), -1)
        parameters = state.constrain(state.warp(self.window), drafts)
        scores = warp_law(processed, parameters, drafts, position).kept()
        new = (combined, processed, scores)
        if first:
            old = (self.combined, self.processed, self.scores)
            new = tuple(torch.cat([a, b], dim=1) for a, b in zip(old, new, strict=True))  # type: ignore[assignment]
        self.combined, self.processed, self.scores = new

    def combined_row(self, state: DecodeState, row: int, count: int) -> Tensor:
        """One row's combined logits [count, V] at its first positions, before processors and warp."""
        lines = {role: logits[row : row + 1, :count] for role, logits in self.by_role.items()}
        strengths = self.strengths[row : row + 1, :count]
        pairs = [pair.term(lines, strengths[..., i]) for i, pair in enumerate(self.pair_roles)]
        return combine_logits(lines[BASE], pairs, state.vocab_size, state.shared_ids)[0][0]

    def take(self, path: WindowLogits) -> None:
        """Become the window of a path through the tree that was scored here."""
        self.by_role, self.strengths, self.window = path.by_role, path.strengths, path.window
        self.combined, self.processed, self.scores = path.combined, path.processed, path.scores

    def unusable_roles(self, row: int, position: int) -> list[str]:
        """Roles whose logits of one position hold NaN or +inf; else anti-experts with -inf; else it is their sum."""
        lines = {role: logits[row, position] for role, logits in self.by_role.items()}
        roles = [role for role, line in lines.items() if bool((line.isnan() | (line == inf)).any())]
        anti_experts = [pair.anti_expert for pair in self.pair_roles if pair.anti_expert is not None]
        return roles or [role for role in anti_experts if bool((lines[role] == -inf).any())] or ["target"]


def score_window(state: DecodeState, runners: TrioRunners, draft: Draft) -> WindowLogits:
    """Logits of every model over the pending token and the drafts; an expert that has drafted has its own already.

    Args:
        state: the rows in flight.
        runners: of the trio; the caches of the models that run are written, their lengths stay.
        draft: of this cycle.
    """
    by_role = {} if draft.expert_logits is None else {EXPERT: draft.expert_logits}

    def score(role: str, tokens: Tensor) -> Tensor:
        runner = runners.by_role[role]
        nodes = None if draft.tree is None else runners.nodes(draft.tree, runner.device)
        return runner.forward(tokens, nodes=nodes)

    inputs = {
        role: torch.cat([state.pending[role][:, None], draft.tokens], dim=1)  # [B, W]
        for role in runners.by_role
        if role not in by_role
    }
    depth = None if draft.tree is None else runners.nodes(draft.tree, state.device).depth
    window = WindowLogits(by_role, runners.pairs, state.strengths(draft.count + 1, depth), draft.count + 1)
    branches = runners.branches
    bonus: dict[str, Tensor] = {}  # what a shared pass adds to the logits of an expert that has drafted
    for pair in runners.pairs:
        # A tree's expert has run all that pays already, and so has one whose last law nothing was drawn from.
        has_all = draft.tree is not None or (pair.expert in by_role and window.num_scored == window.window)
        if pair.expert in runners.packed and not has_all:
            with branches.beside():
                bonus |= _score_packed(runners, pair, inputs, draft, by_role)
    for role, tokens in inputs.items():
        if role != BASE and role not in by_role:
            with branches.beside():
                by_role[role] = score(role, tokens)
    if runners.overlaps and draft.tree is None and draft.expert_logits is not None and not bonus:
        with branches.beside():  # reached or not: it costs no time of its own there
            bonus_step(state, runners, draft, window)
    by_role[BASE] = score(BASE, inputs[BASE])
    branches.join()
    for role in inputs:
        # Only now: a copy between devices would hold the base's forward up until the model behind it is done.
        by_role[role] = by_role[role].to(state.device)
    for role, logits in bonus.items():
        by_role[role] = torch.cat([by_role[role], logits.to(state.device)], dim=1)
    return window


def _score_packed(
    runners: TrioRunners, pair: Pair, inputs: dict[str, Tensor], draft: Draft, by_role: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Both models of a pair of one set of weights in one forward.

    An expert that has drafted brings its bonus position alone: at one more token a row that costs less than a pass over
    the weights of its own, even where no row reaches the position. Its logits there are returned, by role.
    """
    assert pair.anti_expert is not None
    packed, drafted = runners.packed[pair.expert], by_role.get(pair.expert)
    window = inputs[pair.anti_expert]
    if drafted is None:
        by_role[pair.anti_expert], by_role[pair.expert] = packed.forward(window, inputs[pair.expert])
        return {}
    done = drafted.shape[1]
    by_role[pair.anti_expert], logits = packed.forward(window, draft.tokens[:, done - 1 :], tuned_offset=done)
    return {pair.expert: logits}


def bonus_step(state: DecodeState, runners: TrioRunners, draft: Draft, window: WindowLogits) -> None:
    """Complete `window` with the expert's logits at the bonus position, where it has stepped up to there."""
    if window.num_scored == window.window:
        return
    logits = runners.expert.forward(draft.tokens[:, -1:], offset=draft.count).to(state.device)
    window.by_role[EXPERT] = torch.cat([window.by_role[EXPERT], logits], dim=1)
