"""The decode state's buffers: written in place, never moved, and idle behind the rows in flight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specproxy import AlphaSchedule
from specproxy.config import SamplingParameters
from specproxy.processors import RowLaw, TokenBan
from specproxy.state import ANTI_EXPERT, BASE, EXPERT, DecodeState, Row

ROLES = (BASE, EXPERT, ANTI_EXPERT)
VOCAB = 40


def row(index: int, budget: int = 9, bans: tuple[TokenBan, ...] = (), **sampling: Any) -> Row:
    return Row(
        index=index,
        prompts={BASE: [1, 2 + index], EXPERT: [3 + index], ANTI_EXPERT: [4, 5, 6 + index]},
        law=RowLaw(SamplingParameters(**sampling), bans=bans),
        alphas=(0.5 + index,),
        key=100 + index,
        max_new_tokens=budget,
        eos_token_ids=frozenset(),
    )


def empty(max_rows: int = 4) -> DecodeState:
    return DecodeState(max_rows, torch.device("cpu"), VOCAB, None, "rejection", ROLES)


def pointers(state: DecodeState) -> dict[str, int]:
    warp = state.warp(3)
    tensors = {"start": state.start, "key": state.key, "alpha": state.alpha, "remaining": state.remaining}
    tensors |= {name: state.pending[name] for name in ROLES} | {"temperature": warp.temperature}
    tensors |= {name: getattr(warp, name) for name in ("top_k", "top_p", "seen", "repetition_penalty", "allowed")}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def test_every_tensor_stays_where_it_is_through_admission_commit_and_eviction():
    full = {"do_sample": True, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    ban = (TokenBan(frozenset({7})),)
    state = empty()
    state.admit([row(0, bans=ban, **full), row(1, **full)])
    before = pointers(state)
    assert {"top_k", "top_p", "seen", "repetition_penalty", "allowed"} <= set(before)
    state.commit(torch.tensor([[8, 9], [8, 9]]), torch.tensor([1, 2]), torch.tensor([3, 4]))
    state.admit([row(2, **full)])
    state.keep([2, 0])
    assert pointers(state) == before
    assert len(state) == state.width == 2


def test_a_commit_advances_rows_and_their_budgets():
    state = empty()
    state.admit([row(0, budget=9), row(1, budget=2), row(2)])
    advance = state.commit(torch.tensor([[8, 9]] * 3), torch.tensor([2, 1, 0]), torch.tensor([30, 31, 32]))
    assert advance.tolist() == [3, 2, 1]
    assert state.start.tolist() == [3, 2, 1]
    assert state.remaining.tolist() == [6, 0, 8]
    for role in ROLES:
        assert state.pending[role].tolist() == [30, 31, 32]
    assert state.num_drafts(4).tolist() == [4, 0, 4]


def test_rows_that_stay_keep_their_own_values_and_the_others_become_idle():
    state = empty()
    state.admit([row(i, budget=9 - i, do_sample=True, temperature=1.0 + i) for i in range(4)])
    state.keep([3, 1])
    assert state.key.tolist() == [103, 101]
    assert state.alpha[:, 0].tolist() == [3.5, 1.5]
    assert state.remaining.tolist() == [6, 8]
    assert state.warp(1).temperature.tolist() == [4.0, 2.0]
    assert [state.pending[role].tolist() for role in ROLES] == [[5, 3], [6, 4], [9, 7]]
    idle = state._buffers["remaining"][2:]
    assert idle.tolist() == [0, 0]


def test_tokens_seen_before_the_first_penalty_count():
    """The buffer is made when a row first needs it; rows in flight by then are entered with all they hold."""
    state = empty()
    state.admit([row(0)])
    assert state.seen is None
    state.rows[0].tokens.append(33)
    state.admit([row(1, repetition_penalty=1.5)])
    assert state.seen is not None
    assert [line.nonzero()[:, 0].tolist() for line in state.seen] == [[1, 2, 33], [1, 3]]


def test_rows_in_flight_keep_their_strength_when_another_brings_a_schedule():
    state = empty()
    state.admit([row(0), row(1)])
    assert not state.has_schedules and state.strengths(2)[..., 0].tolist() == [[0.5, 0.5], [1.5, 1.5]]
    state.admit([replace(row(2), schedule=AlphaSchedule(half_life=1)), row(3)])
    assert state.strengths(3)[..., 0].tolist() == [[0.5] * 3, [1.5] * 3, [2.5, 1.25, 0.625], [3.5] * 3]
    place = state._buffers["schedule"].data_ptr()
    state.commit(torch.tensor([[8, 9]] * 4), torch.tensor([1, 1, 1, 1]), torch.tensor([3, 3, 3, 3]))
    state.keep([3, 2])
    assert state.strengths(2)[..., 0].tolist() == [[3.5] * 2, [0.625, 0.3125]]
    assert state.strengths(3, torch.tensor([0, 1, 1]))[1, :, 0].tolist() == [0.625, 0.3125, 0.3125]
    assert state._buffers["schedule"].data_ptr() == place


def test_a_ban_that_ends_needs_the_host_until_then():
    state = empty()
    state.admit([row(0, bans=(TokenBan(frozenset({7}), until=2),))])
    assert state.needs_host
    state.rows[0].append([8, 9], ["target", "target"])
    assert not state.needs_host


def test_more_rows_than_buffers():
    state = empty(max_rows=1)
    with pytest.raises(AssertionError, match="more rows than buffers"):
        state.admit([row(0), row(1)])
