"""The expert's drafts with fewer of its forwards: lookup guesses them, and one forward tells how far it guessed right.

The drafts are the expert's own, drawn from its law with the noise of their positions, so that they are the tokens of
`specproxy.draft.expert` whatever lookup says: a guess only decides how many positions one forward reaches. Under every
rule the result is that of the expert as drafter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specproxy.draft.expert import draw_draft, join_draft, no_draft
from specproxy.draft.lookup import look_up
from specproxy.policy import Plan
from specproxy.state import EXPERT, DecodeState, Draft, Row
from specproxy.trio import TrioRunners
from specproxy_kernels import DraftLaw, NoiseStream

__all__ = ["CascadeDrafter"]


class CascadeDrafter:
    """Draws what the expert would draw step by step, over windows of guessed tokens."""

    name = "cascade"

    def propose(self, state: DecodeState, runners: TrioRunners, noise: NoiseStream, plan: Plan) -> Draft:
        """Draw `plan.num_drafts` tokens per row; see `Drafter`."""
        count = plan.num_drafts
        if count == 0:
            return no_draft(state)
        parameters = state.warp(count + 1)
        noise.expect(count + (state.rule == "coupled"))
        reach = _Reach(state, runners, count)
        drafts = torch.empty(state.width, 0, dtype=torch.long, device=state.device)
        laws: list[DraftLaw] = []
        while len(laws) < count:
            done = len(laws)
            if reach.everywhere == done:
                reach.extend()
            for i in range(done, reach.everywhere):
                token, law = draw_draft(state, reach.logits[:, i : i + 1], parameters, drafts, noise)
                drafts = torch.cat([drafts, token], dim=1)
                laws.append(law)
            # What was drawn behind a wrong guess came from logits of another text: it is drawn once more.
            reach.settle(done, drafts[:, done:].tolist())
            right = min(len(laws), reach.everywhere)
            drafts, laws = drafts[:, :right], laws[:right]
        return join_draft(state, drafts, state.num_drafts(count), laws, reach.logits)


class _Reach:
    """How far the expert's logits reach over a window of each row.

    A row's path holds the tokens behind its pending one: its drafts, and behind them guesses. Logits at a position are
    good while the path up to there is.
    """

    def __init__(self, state: DecodeState, runners: TrioRunners, count: int) -> None:
        self._state, self._runner, self._count = state, runners.expert, count
        self._paths: list[list[int]] = [[] for _ in state.rows]
        self._known = [0] * len(state)  # leading positions with good logits, if the guesses are right
        self.logits: Tensor = torch.empty(0)  # [B, G, V_expert], from the first forward on

    @property
    def everywhere(self) -> int:
        """Leading positions that every row has logits for."""
        return min(self._known)

    def extend(self) -> None:
        """One forward over the positions that follow, as many as there are guesses for."""
        state, count = self._state, self._count
        for row, path in zip(state.rows, self._paths, strict=True):
            path += look_up(state, row, max(0, count - 1 - len(path)), path).tokens
        ends = [min(len(path) + 1, count) for path in self._paths]
        size = max(end - known for end, known in zip(ends, self._known, strict=True))
        # Rows that need fewer positions run some again: nothing is written behind the window.
        starts = [min(known, count - size) for known in self._known]
        lines = [[_pending(row), *path] for row, path in zip(state.rows, self._paths, strict=True)]
        inputs = [(line + [0] * count)[start : start + size] for line, start in zip(lines, starts, strict=True)]
        new = self._runner.forward(torch.tensor(inputs).to(state.device), offset=starts).to(state.device)
        if self.logits.ndim == 1:
            self.logits = new.new_zeros(len(lines), count, new.shape[2])
        for i, (start, known) in enumerate(zip(starts, self._known, strict=True)):
            self.logits[i, known : start + size] = new[i, known - start :]  # what was drawn from stays
        self._known = ends

    def settle(self, first: int, drawn: list[list[int]]) -> None:
        """Hold guesses against the drafts from position `first` on; a path goes on as its first wrong guess's draft."""
        for i, (path, tokens) in enumerate(zip(self._paths, drawn, strict=True)):
            for position, token in enumerate(tokens, start=first):
                if position == len(path) or path[position] != token:
                    path[position:] = [token]
                    self._known[i] = position + 1
                    break


def _pending(row: Row) -> int:
    """The row's last token, which no model has read."""
    return row.tokens[-1] if row.tokens else row.prompts[EXPERT][-1]
