"""The decode loop: one `step` is draft, verify, accept, commit. W = 1 is exact per-step proxy-tuning: the same code.

Rows are admitted and evicted between steps. Knows nothing of requests, text or argument checking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specproxy.accept import Outcome, accept
from specproxy.draft import draft_with_expert
from specproxy.policy import CycleReport, WindowPolicy
from specproxy.state import DecodeState, Draft, Row
from specproxy.stats import DRAFT, TARGET, SpeculationStats
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits, score_window
from specproxy_kernels import STATUS_EMPTY_RESIDUAL, STATUS_EMPTY_SUPPORT, STATUS_NON_FINITE

__all__ = ["Cycle", "admit", "cycle", "evict_finished", "step"]

_ERRORS = STATUS_NON_FINITE | STATUS_EMPTY_SUPPORT


@dataclass
class Cycle:
    """What a cycle leaves behind on the device.

    Args:
        packed: int64 [B, G + 4]: drafts, and of every row its number of drafts, accepted drafts, next token, status.
        window: the scored window, for messages and for recorded logits.
    """

    packed: Tensor
    window: WindowLogits


def step(state: DecodeState, runners: TrioRunners, policy: WindowPolicy, stats: SpeculationStats) -> list[Row]:
    """Run one cycle over all rows in flight.

    Args:
        state: the rows in flight, at least one.
        runners: of the trio.
        policy: chooses the number of drafts and hears what came of them.
        stats: takes the counts.

    Returns:
        The rows that took part; those with a `finish_reason` are no longer in flight.
    """
    count = _num_drafts(state, runners, policy)
    expert_seconds = -runners.expert.timer.total
    result = cycle(state, runners, count)
    rows, tested, accepted = _settle(state, runners, result, stats)

    expert_seconds += runners.expert.timer.total
    window_seconds = sum(runner.timer.last for runner in runners if runner is not runners.expert)
    steps = max(result.window.num_scored, 1)
    policy.observe(CycleReport(count, tested, accepted, expert_seconds / steps, window_seconds))
    return rows


def cycle(state: DecodeState, runners: TrioRunners, count: int) -> Cycle:
    """Draft, verify, accept and commit on the device. What follows from it on the host is left to `_settle`.

    Where a row `needs_host` Python takes part; otherwise this reads nothing that changes between cycles but tensors.

    Args:
        state, runners: as in `step`.
        count: G.
    """
    noise = state.noise()
    draft = draft_with_expert(state, runners, noise, count)
    window = score_window(state, runners, draft)
    outcome = accept(state, runners, noise, draft, window)
    return Cycle(_commit(state, runners, draft, outcome), window)


def _num_drafts(state: DecodeState, runners: TrioRunners, policy: WindowPolicy) -> int:
    """The policy's choice, within every row's positions and the longest budget; no draft token enters it."""
    longest_budget = max(row.remaining for row in state.rows)
    return max(0, min(policy.num_drafts(), longest_budget - 1, runners.room(len(state)) - 1))


def _commit(state: DecodeState, runners: TrioRunners, draft: Draft, outcome: Outcome) -> Tensor:
    """The only place that changes the device's side: tokens, budgets, lengths. Returns `Cycle.packed`."""
    columns = (draft.num_drafts, outcome.num_accepted, outcome.next_token, outcome.status)
    packed = torch.cat([draft.tokens, *(column[:, None] for column in columns)], dim=1)
    advance = state.commit(draft.tokens, outcome.num_accepted, outcome.next_token)
    for runner in runners:
        runner.cache.advance(advance)
    return packed


def _settle(
    state: DecodeState, runners: TrioRunners, result: Cycle, stats: SpeculationStats
) -> tuple[list[Row], int, int]:
    """The only place that changes the host's side: tokens, ends of rows, statistics, eviction.

    Returns:
        The rows that took part, drafts verified up to each row's first refusal, drafts accepted; both summed.
    """
    packed = result.packed[: len(state)].tolist()  # the cycle's one synchronisation
    for runner in runners:
        runner.cache.follow([line[-3] + 1 for line in packed])
    rows = list(state.rows)
    tested = accepted = 0
    for slot, (row, line) in enumerate(zip(rows, packed, strict=True)):
        *drafts, drafted, num_accepted, next_token, status = line
        tokens, sources = drafts[:num_accepted], [DRAFT] * num_accepted
        if not status & _ERRORS:
            tokens, sources = [*tokens, next_token], [*sources, TARGET]
        taken = row.append(tokens, sources)
        if status & _ERRORS and row.finish_reason is None:
            row.fail(_reason(row, result.window, slot, num_accepted, status))
        if state.records_logits:
            row.logits += list(result.window.combined[slot, :taken].float())
            row.scores += list(result.window.scores[slot, :taken].float())
        stats.record(drafted, num_accepted, taken)
        stats.num_empty_residuals += bool(status & STATUS_EMPTY_RESIDUAL)
        tested += min(num_accepted + 1, drafted)
        accepted += num_accepted
    evict_finished(state, runners)
    return rows, tested, accepted


def _reason(row: Row, window: WindowLogits, slot: int, position: int, status: int) -> str:
    """Why no token can be drawn for a row at its current end."""
    place = f"row {row.index}, new token {len(row.tokens)}"
    if status & STATUS_EMPTY_SUPPORT:
        return f"{place}: every token is masked, none is left to draw"
    roles = window.unusable_roles(slot, position)
    return f"{place}: the logits of the {' and '.join(roles)} are not usable (NaN or infinite)"


def evict_finished(state: DecodeState, runners: TrioRunners) -> None:
    """Take finished rows out: the last row moves into each gap, so that rows stay dense.

    Between steps any row may be given a `finish_reason` and be taken out by this.
    """
    before = len(state)
    if all(row.finish_reason is None for row in state.rows):
        return
    slots = list(range(len(state.rows)))
    for slot in reversed(range(len(slots))):
        row = state.rows[slot]
        if row.finish_reason is None:
            continue
        if row.finish_reason == "error":
            for runner in runners:
                runner.cache.clear(slot)
        last = slots.pop()
        if slot < len(slots):
            slots[slot] = last
            for runner in runners:
                runner.cache.move(len(slots), slot)
    for runner in runners:
        runner.cache.empty(len(slots), before)
    state.keep(slots)


def admit(state: DecodeState, runners: TrioRunners, rows: list[Row]) -> None:
    """Prefill rows behind those in flight; they take part from the next step on.

    Every prompt's last token stays pending: it opens the row's first window.
    """
    first = len(state)
    for runner in runners:
        runner.prefill(first, [row.prompts[runner.role][:-1] for row in rows])
    state.admit(rows)
