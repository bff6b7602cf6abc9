"""The default drafter: the expert itself, one step at a time. Its logits then serve the target's law as well.

Where the plan says so, the length of the draft follows from the entropies of the laws that it is drawn from, read on
the host after every step. A position's law is known before a token is drawn there: it follows from tokens that are
verified alone, so that no draft is discarded because of what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specproxy.draft.entropy import expert_entropy
from specproxy.policy import Plan
from specproxy.state import EXPERT, DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy_kernels import DraftLaw, NoiseStream, WarpParameters, combine_logits, sample_drafts

__all__ = ["ExpertDrafter", "draw_draft", "join_draft", "no_draft"]

_AHEAD = 2  # positions past the length that a draft aims at whose noise is drawn along: it may yet grow


class ExpertDrafter:
    """Draws from the expert's warped law, and leaves its logits at window positions 0 .. G - 1."""

    name = "expert"

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Draw `plan.num_drafts` tokens per row, or fewer where `plan.stop` says so; see `Drafter`."""
        return _draw(state, runners, noise, plan)


def _draw(state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
    count, stop = plan.num_drafts, plan.stop
    if count == 0:
        return no_draft(state)
    parameters = state.warp(count + 1)
    drafts = torch.empty(state.width, 0, dtype=torch.long, device=state.device)
    # The coupled rule reads the bonus token's noise from the same purpose: draw it along.
    noise.expect(count + (state.rule == "coupled"))
    laws: list[DraftLaw] = []
    raw: list[Tensor] = []
    entropies: list[Tensor] = []
    token, length = state.pending[EXPERT][:, None], count
    while len(raw) < max(length, 1):
        raw.append(runners.expert.forward(token, offset=len(raw)).to(state.device))
        if stop is not None:
            entropies.append(expert_entropy(raw[-1], state.vocab_size))
            length = stop.length(torch.cat(entropies, dim=1).tolist())
            if length < len(raw):
                break
            noise.expect(min(length + _AHEAD, count) + (state.rule == "coupled"))
        token, law = draw_draft(state, raw[-1], parameters, drafts, noise)
        drafts = torch.cat([drafts, token], dim=1)
        laws.append(law)
    # No row drafts past its own budget, so that its tokens do not depend on how long its neighbours go on.
    draft = join_draft(state, drafts, state.num_drafts(len(laws)), laws, None) if laws else no_draft(state)
    # Without processors the law keeps the very logits that the model gave: no second copy.
    is_kept = draft.law is not None and len(laws) == len(raw) and not state.has_processors
    draft.expert_logits = draft.law.logits if is_kept and draft.law is not None else torch.cat(raw, dim=1)
    draft.entropies = torch.cat(entropies, dim=1) if entropies else None
    return draft


def no_draft(state: DecodeState) -> Draft:
    """The draft of a per-step cycle."""
    nothing = torch.empty(state.width, 0, dtype=torch.long, device=state.device)
    return Draft(nothing, state.num_drafts(0), None, None)


def join_draft(
    state: DecodeState, drafts: Tensor, num_drafts: Tensor, laws: list[DraftLaw], expert_logits: Tensor | None
) -> Draft:
    """A draft from what was drawn position by position.

    Args:
        state: the rows in flight.
        drafts: int64 [B, G].
        num_drafts: int64 [B].
        laws: of each position.
        expert_logits: as in `Draft`.
    """
    tau = None if laws[0].tau is None else torch.cat([law.tau for law in laws if law.tau is not None], dim=1)
    joined = DraftLaw(torch.cat([law.logits for law in laws], dim=1), tau, torch.cat([law.lse for law in laws], dim=1))
    return Draft(drafts, num_drafts, joined, expert_logits)


def draw_draft(
    state: DecodeState, logits: Tensor, parameters: WarpParameters, drafts: Tensor, noise: NoiseStream
) -> tuple[Tensor, DraftLaw]:
    """Draw one draft of every row from a drafting model's law.

    Args:
        state: the rows in flight.
        logits: the model's raw logits [B, 1, V_draft] behind the drafts.
        parameters: of the rows.
        drafts: int64 [B, i], of the window before this position.
        noise: of the cycle.

    Returns:
        int64 [B, 1] and the law, as in `specproxy_kernels.sample_drafts`.
    """
    if state.has_processors:
        logits = combine_logits(logits, [], state.vocab_size, state.shared_ids)[0]
        logits = state.process(logits, drafts, first=drafts.shape[1])
    parameters = state.constrain(parameters, drafts)
    return sample_drafts(logits, parameters, drafts, noise, state.vocab_size)
