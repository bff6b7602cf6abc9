"""From a scored window to tokens: acceptance, the bonus position where reached, and every row's next token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specproxy.state import DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits, bonus_step
from specproxy.walk import walk
from specproxy_kernels import LogitPair, NoiseStream, accept_window, emit_next_token, kernel_path, verify_window

__all__ = ["Outcome", "accept"]


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
    shared = (draft.law, state.warp(draft.count + 1), noise, state.vocab_size)
    if kernel_path(state.device) == "triton":
        # Asking whether any row reaches the bonus position would synchronise, which costs more than its step.
        bonus_step(state, runners, draft, window)
        base, pairs = _law_inputs(state, draft, window)
        return Outcome(*verify_window(state.rule, base, pairs, draft.tokens, draft.num_drafts, *shared))
    base, pairs = _law_inputs(state, draft, window)
    acceptance = accept_window(state.rule, base, pairs, draft.tokens, draft.num_drafts, *shared)
    if window.num_scored < window.window and (state.device.type != "cpu" or bool(acceptance.is_bonus.any())):
        bonus_step(state, runners, draft, window)
        base, pairs = _law_inputs(state, draft, window)
    next_token, status = emit_next_token(state.rule, base, pairs, draft.tokens, acceptance, *shared)
    return Outcome(acceptance.num_accepted, next_token, status)


def _law_inputs(state: DecodeState, draft: Draft, window: WindowLogits) -> tuple[Tensor, list[LogitPair]]:
    """Raw logits and pairs for the fused arithmetic, or dense processed logits where Python has had to see them."""
    if not (state.has_processors or state.records_logits):
        return window.base, window.pairs()
    window.resolve(state, draft.tokens)
    return window.processed, []
