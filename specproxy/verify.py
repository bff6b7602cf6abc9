"""Scoring a window: one forward of the base and one of the anti-expert over all W positions.

The anti-expert never steps: it proposes nothing. The expert's logits come from drafting; its step at the bonus
position is run by `bonus_step`, only where some row reaches that position.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from specproxy.state import ANTI_EXPERT, BASE, EXPERT, DecodeState, Draft
from specproxy.trio import TrioRunners
from specproxy_kernels import LogitPair

__all__ = ["WindowLogits", "bonus_step", "score_window"]


@dataclass
class WindowLogits:
    """Raw logits of a window: base and anti-expert [B, W, .], expert [B, G or W, .] or None; alpha [B, W]."""

    base: Tensor
    anti_expert: Tensor
    expert: Tensor | None
    alpha: Tensor

    def pairs(self) -> list[LogitPair]:
        """The pairs of the logit arithmetic, as far as the expert's logits reach."""
        expert = self.anti_expert[:, :0] if self.expert is None else self.expert
        return [LogitPair(expert, self.anti_expert, self.alpha)]

    def unusable_roles(self, row: int, position: int) -> list[str]:
        """Roles whose logits of one position hold NaN or +inf, or -inf in the anti-expert alone."""
        by_role = {BASE: self.base, EXPERT: self.expert, ANTI_EXPERT: self.anti_expert}
        lines = {role: logits[row, position] for role, logits in by_role.items() if logits is not None}
        roles = [role for role, line in lines.items() if bool((line.isnan() | (line == inf)).any())]
        return roles or [ANTI_EXPERT]


def score_window(state: DecodeState, runners: TrioRunners, draft: Draft) -> WindowLogits:
    """Logits of base and anti-expert over the pending token and the drafts.

    Args:
        state: the rows in flight.
        runners: of the trio; the caches of base and anti-expert are written, their lengths stay.
        draft: of this cycle.
    """
    window = {
        role: torch.cat([state.pending[role][:, None], draft.tokens], dim=1)  # [B, W]
        for role in (BASE, ANTI_EXPERT)
    }
    base = runners.base.forward(window[BASE]).to(state.device)
    anti_expert = runners.anti_expert.forward(window[ANTI_EXPERT]).to(state.device)
    return WindowLogits(base, anti_expert, draft.expert_logits, state.alpha[:, None].expand(-1, draft.count + 1))


def bonus_step(state: DecodeState, runners: TrioRunners, draft: Draft, window: WindowLogits) -> None:
    """Run the expert at the bonus position and complete `window` with its logits."""
    token = draft.tokens[:, -1:] if draft.count else state.pending[EXPERT][:, None]
    logits = runners.expert.forward(token, offset=draft.count).to(state.device)
    window.expert = logits if window.expert is None else torch.cat([window.expert, logits], dim=1)
