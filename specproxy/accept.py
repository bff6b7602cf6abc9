"""From a scored window to tokens: acceptance, the bonus position where reached, and every row's next token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specproxy.state import DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits, bonus_step
from specproxy_kernels import NoiseStream, accept_window, emit_next_token

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
        draft: the proposal.
        window: its scores; completed here where needed.
    """
    assert state.warp is not None
    shared = (draft.law, state.warp, noise, state.vocab_size)
    acceptance = accept_window(state.rule, window.base, window.pairs(), draft.tokens, draft.num_drafts, *shared)
    # Asking whether any row needs the bonus step saves it on the CPU, where asking is free; elsewhere asking would
    # synchronise, which costs more than the step.
    if state.device.type != "cpu" or bool(acceptance.is_bonus.any()):
        bonus_step(state, runners, draft, window)
    next_token, status = emit_next_token(state.rule, window.base, window.pairs(), draft.tokens, acceptance, *shared)
    return Outcome(acceptance.num_accepted, next_token, status)
