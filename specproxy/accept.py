"""From a scored window to tokens: acceptance, the bonus position where reached, and every row's next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.draft.expert import draw_draft
from specproxy.state import EXPERT, DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits, bonus_step
from specproxy.walk import walk
from specproxy_kernels import LogitPair, NoiseStream, accept_window, emit_next_token, kernel_path, verify_window

__all__ = ["Outcome", "accept", "would_accept"]


@dataclass
class Outcome:
    """A cycle's result on the device: accepted drafts, next token and status of every row, each [B]."""

    num_accepted: Tensor
    next_token: Tensor
    status: Tensor


def accept(state: DecodeState, runners: TrioRunners, noise: NoiseStream, draft: Draft, window: WindowLogits) -> Outcome:
    """Accept drafts, complete the window where its bonus position is reached, and draw the next tokens.

    Args:
        state: the rows in flight.
        runners: of the trio.
        noise: of this cycle.
        draft: the proposal; a tree is left as the chain that was taken through it.
        window: its scores; completed here where needed.
    """
    if draft.tree is not None:
        return Outcome(*walk(state, runners, noise, draft, window))
    parameters = state.constrain(state.warp(draft.count + 1), draft.tokens)
    shared = (draft.law, parameters, noise, state.vocab_size)
    if kernel_path(state.device) == "triton":
        # Asking whether any row reaches the bonus position would synchronise, which costs more than its step.
        bonus_step(state, runners, draft, window)
        base, pairs = _law_inputs(state, draft.tokens, window, draft.num_drafts)
        return Outcome(*verify_window(state.rule, base, pairs, draft.tokens, draft.num_drafts, *shared))
    base, pairs = _law_inputs(state, draft.tokens, window, draft.num_drafts)
    acceptance = accept_window(state.rule, base, pairs, draft.tokens, draft.num_drafts, *shared)
    if window.num_scored < window.window and (state.device.type != "cpu" or bool(acceptance.is_bonus.any())):
        bonus_step(state, runners, draft, window)
        base, pairs = _law_inputs(state, draft.tokens, window, draft.num_drafts)
    next_token, status = emit_next_token(state.rule, base, pairs, draft.tokens, acceptance, *shared)
    return Outcome(acceptance.num_accepted, next_token, status)


def would_accept(state: DecodeState, noise: NoiseStream, window: WindowLogits) -> Tensor:
    """What a window of one would have made of the expert's draft, had there been one. It decides no token.

    The draft is the one that a longer window would have held, put to the very rule, with the noise of its position. A
    per-step cycle emits that position from noise of another purpose (under `coupled`, from the same draw, which is what
    equality is about), and no later cycle comes back to it: a policy may follow the answer without a bias.

    Args:
        state: the rows in flight.
        noise: of this cycle.
        window: scored, of one position.

    Returns:
        int64 [B], 1 where the draft would have been accepted.
    """
    shape, parameters = (state.width, 0), state.warp(1)
    nothing = torch.empty(shape, dtype=torch.long, device=state.device)
    drafts, law = draw_draft(state, window.by_role[EXPERT], parameters, nothing, noise)
    base, pairs = _law_inputs(state, nothing, window)
    parameters = state.constrain(parameters, nothing)
    shared = (drafts, torch.ones_like(drafts[:, 0]), law, parameters, noise, state.vocab_size)
    if kernel_path(state.device) == "triton":
        # The kernels ask for a bonus position: this one again, whose token nobody reads.
        twice = [
            LogitPair(_twice(expert), None if anti is None else _twice(anti), _twice(alpha))
            for expert, anti, alpha in pairs
        ]
        return verify_window(state.rule, _twice(base), twice, *shared)[0]
    return accept_window(state.rule, base, pairs, *shared).num_accepted


def _twice(side: Tensor) -> Tensor:
    """A window of one, [B, 1] or [B, 1, V], seen as a window of two."""
    return side.expand(-1, 2, *[-1] * (side.ndim - 2))


def _law_inputs(
    state: DecodeState, drafts: Tensor, window: WindowLogits, num_drafts: Tensor | None = None
) -> tuple[Tensor, list[LogitPair]]:
    """Raw logits and pairs for the fused arithmetic, or dense processed logits where Python has had to see them."""
    if not (state.has_processors or state.records_logits):
        return window.base, window.pairs()
    window.resolve(state, drafts, num_drafts)
    return window.processed, []
