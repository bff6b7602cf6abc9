"""The decode loop: one `step` is draft, verify, accept, commit. W = 1 is exact per-step proxy-tuning: the same code.

Rows are admitted and evicted between steps. Knows nothing of requests, text or argument checking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from specproxy.accept import Outcome, accept, would_accept
from specproxy.config import MAX_DRAFT_TOKENS
from specproxy.draft import drafter_of
from specproxy.draft.lookup import Offer, look_up
from specproxy.graphs import bucket
from specproxy.policy import CycleReport, Match, Outlook, Plan, WindowPolicy
from specproxy.ranks import Ranks
from specproxy.state import FINISHED, DecodeState, Draft, Row
from specproxy.stats import DRAFT, TARGET, SpeculationStats
from specproxy.tree import TreeShape
from specproxy.trio import TrioRunners
from specproxy.verify import WindowLogits, score_window
from specproxy_kernels import STATUS_EMPTY_RESIDUAL, STATUS_EMPTY_SUPPORT, STATUS_NON_FINITE

__all__ = ["Cycle", "admit", "cycle", "evict_finished", "step"]

_ON_DEVICE = ("expert",)  # drafters that never look at the rows on the host
_ERRORS = STATUS_NON_FINITE | STATUS_EMPTY_SUPPORT
Leave = Callable[[Row, int], None]


@dataclass
class Cycle:
    """What a cycle leaves behind on the device.

    Args:
        packed: int64 [B, G + 4]: drafts, and of every row its number of drafts, accepted drafts, next token, status.
            With a tree [B, 2 D + G + 4]: the path's drafts, its nodes, the guesses of all nodes, and the same four.
            Where the plan listens [B, 5]: in place of drafts, whether the expert's would have been accepted.
        window: the scored window, for messages and for recorded logits.
        entropies: where the draft was free to stop early, `Draft.entropies` of every row.
    """

    packed: Tensor
    window: WindowLogits
    entropies: list[list[float]] = field(default_factory=list)


def step(
    state: DecodeState,
    runners: TrioRunners,
    policy: WindowPolicy,
    stats: SpeculationStats,
    on_finish: Leave | None = None,
) -> list[Row]:
    """Run one cycle over all rows in flight.

    Args:
        state: the rows in flight, at least one.
        runners: of the trio.
        policy: chooses the number of drafts and hears what came of them.
        stats: takes the counts.
        on_finish: see `evict_finished`.

    Returns:
        The rows that took part; those with a `finish_reason` are no longer in flight.
    """
    began = perf_counter() - runners.capture_seconds
    tokens_before, lengths = stats.num_new_tokens, [len(row.tokens) for row in state.rows]
    offers = _offers(state, policy.offers_wanted)
    plan = _plan(state, runners, policy, offers)
    result = _run(state, runners, plan)
    if plan.stop is not None:
        stats.record_stop(result.window.window - 1 - plan.stop.planned)
        plan = replace(plan, num_drafts=result.window.window - 1)
    rows, packed = _settle(state, runners, plan, result, stats, on_finish)

    report = CycleReport(
        plan,
        rows=tuple(row.index for row in rows),
        num_drafts=tuple(line[-4] for line in packed),
        num_accepted=tuple(line[-3] for line in packed),
        forwards=runners.take_forwards(),
        seconds=perf_counter() - runners.capture_seconds - began,
        ranks=() if plan.tree is None else tuple(_ranks(plan.tree, line) for line in packed),
        heard=tuple(bool(line[0]) for line in packed) if plan.listens else (),
        entropies=tuple(
            tuple(own[: line[-3] + 1]) for own, line in zip(result.entropies, packed, strict=bool(result.entropies))
        ),
        matched=tuple(
            _match(offer, row.tokens[n:]) for offer, row, n in zip(offers, rows, lengths, strict=bool(offers))
        ),
    )
    policy.observe(report)
    emitted = stats.num_new_tokens - tokens_before
    stats.record_cycle(drafter_of(plan).name, plan.window - 1, plan.expected, (emitted, report.seconds))
    return rows


def cycle(state: DecodeState, runners: TrioRunners, plan: Plan) -> Cycle:
    """Draft, verify, accept and commit on the device. What follows from it on the host is left to `_settle`.

    Where a row `needs_host` Python takes part; otherwise this reads nothing that changes between cycles but tensors.

    Args:
        state, runners: as in `step`.
        plan: who drafts, and how many tokens.
    """
    # How long a draft gets shows in the cycle's time, and depends on tokens behind a refused one as well: their noise
    # must not come back in a cycle that was planned knowing that time.
    noise = state.noise(fresh=plan.stop is not None)
    draft = drafter_of(plan).propose(state, runners, noise, plan)
    guesses = draft.tokens = runners.ranks.agree(draft.tokens)
    window = score_window(state, runners, draft)
    outcome = _agreed(runners.ranks, draft, accept(state, runners, noise, draft, window))
    head = [draft.tokens] if draft.nodes is None else [draft.tokens, draft.nodes, guesses]
    if plan.listens:
        head = [would_accept(state, noise, window)[:, None]]
    entropies = [] if draft.entropies is None else draft.entropies.tolist()
    return Cycle(_commit(state, runners, draft, outcome, head), window, entropies)


def _offers(state: DecodeState, count: int) -> list[Offer]:
    """Lookup's offers of at most `count` tokens for every row, as its drafts would be; none for a count of 0."""
    rows = state.rows if count else []
    return [look_up(state, row, max(0, min(count, row.remaining - 1, row.max_draft_tokens))) for row in rows]


def _match(offer: Offer, tokens: list[int]) -> Match:
    """How an offer fared against the tokens that came."""
    pairs = list(zip(offer.tokens, tokens, strict=False))
    agreed = next((i for i, (offered, token) in enumerate(pairs) if offered != token), len(pairs))
    return Match(offer.length, len(pairs), agreed)


def _plan(state: DecodeState, runners: TrioRunners, policy: WindowPolicy, offers: list[Offer]) -> Plan:
    """The policy's choice, within the longest budget; no draft token enters it, and no neighbour's place."""
    # With captures, one for the last window of a text would cost more than drafts of which no row makes use.
    most = max(row.remaining for row in state.rows) if runners.graphs is None else MAX_DRAFT_TOKENS + 1
    rows = tuple(row.index for row in state.rows)
    useful = tuple(min(row.remaining - 1, row.max_draft_tokens) for row in state.rows)
    lengths = tuple((offer.length, len(offer.tokens)) for offer in offers)
    outlook = Outlook(rows, useful, max(0, most - 1), state.equality_decides, _stops(state, runners), lengths)
    return runners.ranks.agree_on(policy.plan(outlook))


def _stops(state: DecodeState, runners: TrioRunners) -> bool:
    """Whether a draft can be stopped early.

    The decision is read on the host after every step of the expert: on a GPU that would be a synchronisation a draft,
    in place of one a cycle, and within a capture it cannot be. Masks on the device would save no forward: a window's
    shape is the same. Processes that share a base would have to agree after every step.
    """
    on_host = state.device.type == runners.expert.device.type == "cpu"
    return on_host and runners.graphs is None and runners.ranks.is_alone


def _run(state: DecodeState, runners: TrioRunners, plan: Plan) -> Cycle:
    """`cycle`, by replay of a capture where nothing needs the host."""
    if runners.graphs is None or state.needs_host or plan.drafter not in _ON_DEVICE:
        state.widen(len(state))
        return cycle(state, runners, plan)
    state.widen(bucket(len(state), state.max_rows))
    runners.reserve_window(len(state), plan.window)
    return runners.graphs.run(
        key=("cycle", plan, state.width, state.rule, state.has_schedules, *state.warp_features),
        generation=(runners.generation, state.start.data_ptr()),
        run=lambda: cycle(state, runners, plan),
        changed=[*state.changing, *runners.lengths],
        title=f"cycle ({state.width} rows, {plan.window - 1} drafts)",
    )


def _agreed(ranks: Ranks, draft: Draft, outcome: Outcome) -> Outcome:
    """The outcome, and in `draft` the path through a tree, that every process commits."""
    if ranks.is_alone:
        return outcome
    draft.tokens = ranks.agree(draft.tokens)
    if draft.nodes is not None:
        draft.nodes = ranks.agree(draft.nodes)
    return Outcome(*map(ranks.agree, (outcome.num_accepted, outcome.next_token, outcome.status)))


def _commit(state: DecodeState, runners: TrioRunners, draft: Draft, outcome: Outcome, head: list[Tensor]) -> Tensor:
    """The only place that changes the device's side: tokens, budgets, lengths. Returns `Cycle.packed`."""
    columns = (draft.num_drafts, outcome.num_accepted, outcome.next_token, outcome.status)
    packed = torch.cat([*head, *(column[:, None] for column in columns)], dim=1)
    advance = state.commit(draft.tokens, outcome.num_accepted, outcome.next_token)
    for runner in runners:
        runner.cache.advance(advance)
    return packed


def _settle(
    state: DecodeState,
    runners: TrioRunners,
    plan: Plan,
    result: Cycle,
    stats: SpeculationStats,
    on_finish: Leave | None,
) -> tuple[list[Row], list[list[int]]]:
    """The only place that changes the host's side: tokens, ends of rows, statistics, eviction.

    Returns:
        The rows that took part, and the lines of `Cycle.packed` as read.
    """
    packed = runners.read(result.packed[: len(state)])
    for runner in runners:
        runner.cache.follow([line[-3] + 1 for line in packed])
    rows = list(state.rows)
    num_nodes = 0 if plan.tree is None else plan.tree.num_drafts
    drafter = drafter_of(plan).name if plan.num_drafts else None
    for slot, (row, line) in enumerate(zip(rows, packed, strict=True)):
        *drafts, drafted, num_accepted, next_token, status = line
        tokens, sources = drafts[:num_accepted], [DRAFT] * num_accepted
        if not status & _ERRORS:
            tokens, sources = [*tokens, next_token], [*sources, TARGET]
        taken = row.append(tokens, sources)
        row.drafter = drafter if drafted else None
        row.refused = []
        if taken > num_accepted:  # what lies behind a row's end was not refused
            row.refused = drafts[num_accepted:drafted] if plan.tree is None else _refused(plan.tree, line)
        if status & _ERRORS and row.finish_reason is None:
            row.fail(_reason(row, result.window, slot, num_accepted, status))
        if state.records_logits:
            row.logits += list(result.window.combined[slot, :taken].float())
            row.scores += list(result.window.scores[slot, :taken].float())
        elif row.keeps_logits:
            row.logits += list(result.window.combined_row(state, slot, taken))
        for counts in (stats, row.statistics):
            if counts is not None:
                counts.record(drafted, num_accepted, taken, num_nodes, drafter)
                counts.num_empty_residuals += bool(status & STATUS_EMPTY_RESIDUAL)
    evict_finished(state, runners, on_finish)
    return rows, packed


def _ranks(tree: TreeShape, line: list[int]) -> tuple[int, ...]:
    """Ranks of a row's accepted drafts, from its line of `Cycle.packed`."""
    return tuple(tree.ranks[node] for node in _path(tree, line))


def _path(tree: TreeShape, line: list[int]) -> list[int]:
    """The nodes of a row's accepted drafts, likewise."""
    depth, num_accepted = (len(line) - 4 - tree.num_drafts) // 2, line[-3]
    return line[depth : depth + num_accepted]


def _refused(tree: TreeShape, line: list[int]) -> list[int]:
    """The branch of first guesses behind a row's accepted drafts, likewise: what a chain would have had refused."""
    path, guesses, drafted = _path(tree, line), line[-4 - tree.num_drafts : -4], line[-4]
    node = tree.best_children[path[-1] if path else 0]
    refused: list[int] = []
    while node and len(path) + len(refused) < drafted:
        refused.append(guesses[node - 1])
        node = tree.best_children[node]
    return refused


def _reason(row: Row, window: WindowLogits, slot: int, position: int, status: int) -> str:
    """Why no token can be drawn for a row at its current end."""
    place = f"row {row.index}, new token {len(row.tokens)}"
    if status & STATUS_EMPTY_SUPPORT:
        return f"{place}: every token is masked, none is left to draw"
    roles = window.unusable_roles(slot, position)
    return f"{place}: the logits of the {' and '.join(roles)} are not usable (NaN or infinite)"


def evict_finished(state: DecodeState, runners: TrioRunners, on_finish: Leave | None = None) -> None:
    """Take finished rows out: the last row moves into each gap, so that rows stay dense.

    Between steps any row may be given a `finish_reason` and be taken out by this.

    Args:
        state, runners: as in `step`.
        on_finish: called with every finished row and its slot while the caches still hold it.
    """
    before = len(state)
    if all(row.finish_reason is None for row in state.rows):
        return
    slots = list(range(len(state.rows)))
    for slot in reversed(range(len(slots))):
        row = state.rows[slot]
        if row.finish_reason is None:
            continue
        if on_finish is not None:
            on_finish(row, slot)
        if row.finish_reason not in FINISHED:  # it may hold what no cycle has found finite
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
