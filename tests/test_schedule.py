"""Strengths that change over a row's new tokens: the same tokens and laws whatever the window."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import chi_square
import pytest
import tiny
import torch
from drop_in import ROWS, batch, model, new_tokens
from loop_law import LoopCase, smallest_p_value

from specproxy import AlphaSchedule, ConfigurationError, ProxyTunedModel
from specproxy.schedule import SCHEDULE_SIZE, scheduled_strengths

COUNT = 12
SCHEDULES = (
    AlphaSchedule(cutoff=4),
    AlphaSchedule(half_life=2.5),
    AlphaSchedule(half_life=1, floor=0.4),
    AlphaSchedule(cutoff=7, half_life=3, floor=0.2),
)
COUPLED = {"do_sample": True, "seed": 5, "acceptance": "coupled", "max_new_tokens": COUNT}


def share(schedule: AlphaSchedule, t: int) -> float:
    """f(t), from the formula."""
    if schedule.cutoff is not None and t >= schedule.cutoff:
        return 0.0
    decay = 1.0 if schedule.half_life is None else 0.5 ** (t / schedule.half_life)
    return schedule.floor + (1 - schedule.floor) * decay


@functools.cache
@torch.no_grad()
def plain_greedy(prompt: tuple[int, ...], schedule: AlphaSchedule, alpha: float = 1.0) -> list[int]:
    """Greedy tokens by `forward` over the whole text, at every token with a model of that token's strength."""
    tokens = list(prompt)
    for t in range(COUNT):
        combined = model(alpha * share(schedule, t)).forward(torch.tensor([tokens])).logits
        tokens.append(int(combined[0, -1].argmax()))
    return tokens[len(prompt) :]


def expected(schedule: AlphaSchedule, alpha: float = 1.0) -> list[list[int]]:
    return [plain_greedy(tuple(prompt), schedule, alpha) for prompt in ROWS]


@pytest.mark.parametrize("schedule", [AlphaSchedule(), AlphaSchedule(cutoff=0), *SCHEDULES], ids=str)
def test_strengths_are_the_formulas(schedule):
    alpha = torch.tensor([[2.0, -0.5], [0.0, 1.0]], dtype=torch.float64)
    index = torch.tensor([[0, 1, 2, 3], [6, 7, 8, 900]])
    numbers = torch.tensor([schedule.numbers, AlphaSchedule(half_life=4).numbers], dtype=torch.float64)
    assert numbers.shape == (2, SCHEDULE_SIZE)
    found = scheduled_strengths(alpha, numbers, index)
    for row, own in enumerate((schedule, AlphaSchedule(half_life=4))):
        for column, t in enumerate(index[row].tolist()):
            assert found[row, column].tolist() == pytest.approx([a * share(own, t) for a in alpha[row].tolist()])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_greedy_tokens_are_those_of_whole_forwards(schedule):
    assert expected(schedule) != expected(AlphaSchedule())
    for count in (0, 4):
        output = model().generate(*batch(), max_new_tokens=COUNT, num_draft_tokens=count, alpha_schedule=schedule)
        assert new_tokens(output) == expected(schedule), count


def test_strengths_in_a_token_tree_go_by_depth():
    arguments = {"num_draft_tokens": 4, "num_tree_tokens": 12, "alpha_schedule": SCHEDULES[3]}
    assert new_tokens(model().generate(*batch(), max_new_tokens=COUNT, **arguments)) == expected(SCHEDULES[3])


@pytest.mark.parametrize("cutoff", [0, 3])
def test_behind_the_cutoff_the_law_is_the_bases_own(cutoff):
    """Windows of five straddle it: logits at every position are those of the whole pair, then the base's alone."""
    recorded = {"return_dict_in_generate": True, "output_logits": True, "num_draft_tokens": 4}
    output = model().generate(
        *batch(), max_new_tokens=COUNT, alpha_schedule=AlphaSchedule(cutoff=cutoff), **recorded
    )  # fmt: skip
    base = tiny.shared_trio("llama").base
    for row, (prompt, tokens) in enumerate(zip(ROWS, new_tokens(output.sequences), strict=True)):
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            parts = {True: model().forward(ids).logits[0], False: base(input_ids=ids).logits[0]}
        for t, logits in enumerate(output.logits):
            plain = parts[t < cutoff][len(prompt) + t - 1]
            torch.testing.assert_close(logits[row], plain.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_coupled_tokens_do_not_depend_on_the_window(schedule):
    per_step = model().generate(*batch(), num_draft_tokens=0, alpha_schedule=schedule, **COUPLED)
    assert not torch.equal(per_step, model().generate(*batch(), num_draft_tokens=0, **COUPLED))
    for count in (1, 4):
        found = model().generate(*batch(), num_draft_tokens=count, alpha_schedule=schedule, **COUPLED)
        assert torch.equal(found, per_step), count


@pytest.mark.parametrize("count", [0, 4])
def test_schedules_by_row_equal_rows_alone(count):
    schedules = [SCHEDULES[0], None, SCHEDULES[3]]
    alphas = [1.0, 0.5, 1.5]
    rows = new_tokens(
        model().generate(*batch(), alpha=alphas, alpha_schedule=schedules, max_new_tokens=COUNT, num_draft_tokens=count)
    )
    for row, prompt in enumerate(ROWS):
        own = schedules[row] or AlphaSchedule()
        assert rows[row] == plain_greedy(tuple(prompt), own, alphas[row])


def test_schedules_of_prompts_hold_for_all_their_sequences():
    sampling = {**COUPLED, "num_return_sequences": 2}
    per_prompt = model().generate(*batch(), alpha_schedule=list(SCHEDULES[:3]), **sampling)
    per_row = model().generate(*batch(), alpha_schedule=[s for s in SCHEDULES[:3] for _ in range(2)], **sampling)
    assert torch.equal(per_prompt, per_row)


def test_every_pair_follows_the_schedule():
    base, expert, anti_expert = tiny.shared_trio("llama").models
    halves = ProxyTunedModel(base, expert, anti_expert, alpha=0.4, further_pairs=[(expert, anti_expert, 0.6)])
    output = halves.generate(*batch(), max_new_tokens=COUNT, alpha_schedule=SCHEDULES[3])
    assert new_tokens(output) == expected(SCHEDULES[3])


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_sampled_tokens_follow_the_changing_law(rule):
    """Drafts oppose the target; the cutoff falls into the first window. See `chi_square` for the test's power."""
    schedule = AlphaSchedule(cutoff=2, half_life=1.5)
    shares = tuple(share(schedule, t) for t in range(3))
    case = LoopCase(rule, 2, {"alpha_schedule": schedule}, shares=shares, alpha=1.5, extra=1)
    assert smallest_p_value(ProxyTunedModel, case, 3_000, seed=8) > chi_square.LEVEL
    if rule == "rejection":  # the test would see strengths that are one token off
        late = replace(case, shares=(shares[1], shares[2], 0.0))
        assert smallest_p_value(ProxyTunedModel, late, 3_000, seed=8) < chi_square.LEVEL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutoff": -1}, "cutoff=-1 must be an integer of at least 0"),
        ({"cutoff": 2.5}, "cutoff=2.5"),
        ({"half_life": 0}, "half_life=0 must be above 0"),
        ({"half_life": math.inf}, "half_life=inf"),
        ({"half_life": 2, "floor": 1.5}, "floor=1.5 must be a share"),
        ({"floor": 0.5}, "floor=0.5 bounds a decay"),
    ],
)
def test_unusable_schedules(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        AlphaSchedule(**arguments)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "alpha_schedule=0.5 is no schedule"),
        ([0.5] * 3, "is no schedule"),
        ([SCHEDULES[0]] * 2, "2 values for 3 rows"),
    ],
)
def test_what_is_no_schedule_of_the_rows(value, message):
    with pytest.raises(ConfigurationError, match=message):
        model().generate(*batch(), alpha_schedule=value)
