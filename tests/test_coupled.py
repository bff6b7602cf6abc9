"""Coupled sampling: the text is a function of models, prompt and seed, whatever the window or the batch.

Also what a seed means under every acceptance rule.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from support import PAD, RolePrompts, greedy_rows, role_prompts

from specproxy import ProxyTunedModel

FOUR = role_prompts([3, 9, 1, 6], seed=21)
THREE_OWN = role_prompts([3, 9, 1], [8, 2, 11], [4, 10, 1], seed=22)
RULES = ("rejection", "block", "coupled")

WARPERS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "defaults": {},
    "hot": {"top_k": 0, "temperature": 1.7},
    "cold": {"top_k": 0, "temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.1},
    "penalty": {"top_k": 0, "repetition_penalty": 1.3},
    "reward": {"top_k": 0, "repetition_penalty": 0.8},
    "k_and_p": {"top_k": 7, "top_p": 0.9, "temperature": 1.3},
    "all": {"top_k": 12, "top_p": 0.95, "min_p": 0.02, "temperature": 1.2, "repetition_penalty": 1.2},
}


def sample(model: ProxyTunedModel, prompts: RolePrompts, **settings: Any) -> Any:
    """One sampled call with statistics; 14 new tokens."""
    settings = {"max_new_tokens": 14, "acceptance": "coupled", "pad_token_id": PAD, **settings}
    return model.generate(**prompts.kwargs(), do_sample=True, return_dict_in_generate=True, **settings)


def new_tokens(output: Any, prompts: RolePrompts) -> list[list[int]]:
    """The new part of every row."""
    return output.sequences[:, max(map(len, prompts.base)) :].tolist()


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


@pytest.mark.parametrize("warper", WARPERS)
def test_every_window_gives_the_per_step_tokens(model, warper):
    settings = WARPERS[warper]
    per_step = sample(model, FOUR, num_draft_tokens=0, seed=5, **settings)
    drafted = accepted = 0
    for num_draft_tokens in (1, 4, 8):
        output = sample(model, FOUR, num_draft_tokens=num_draft_tokens, seed=5, **settings)
        assert output.sequences.tolist() == per_step.sequences.tolist(), f"{num_draft_tokens} drafts"
        drafted += output.speculation.num_draft_tokens
        accepted += output.speculation.num_accepted_tokens
    assert 0 < accepted < drafted


@pytest.mark.parametrize("num_draft_tokens", [*range(1, 10), "auto"])
def test_windows_of_every_size_with_prompts_per_role(model, num_draft_tokens):
    settings = {"alpha": 0.7, "temperature": 1.2, "top_k": 20, "seed": [3, 2**40, 0]}
    per_step = sample(model, THREE_OWN, num_draft_tokens=0, **settings)
    output = sample(model, THREE_OWN, num_draft_tokens=num_draft_tokens, **settings)
    assert output.sequences.tolist() == per_step.sequences.tolist()


@pytest.mark.parametrize("kind", [kind for kind in tiny.SUPPORTED if kind != "llama"])
def test_every_architecture(kind):
    model = ProxyTunedModel(*tiny.shared_trio(kind).models)
    settings = {"seed": 11, "top_p": 0.95, "repetition_penalty": 1.1}
    per_step = sample(model, THREE_OWN, num_draft_tokens=0, **settings)
    assert sample(model, THREE_OWN, num_draft_tokens=5, **settings).sequences.tolist() == per_step.sequences.tolist()


def test_mixed_architectures():
    model = ProxyTunedModel(*tiny.shared_trio("llama", "gpt2").models)
    per_step = sample(model, THREE_OWN, num_draft_tokens=0, seed=1)
    assert sample(model, THREE_OWN, num_draft_tokens=3, seed=1).sequences.tolist() == per_step.sequences.tolist()


def test_end_of_text_cuts_the_per_step_text(model):
    """The end of one row changes no token of another, nor of its own beginning."""
    open_ended = new_tokens(sample(model, FOUR, num_draft_tokens=0, seed=5), FOUR)
    eos = {open_ended[0][3], open_ended[2][6]}
    for num_draft_tokens in (0, 2, 5):
        output = sample(model, FOUR, num_draft_tokens=num_draft_tokens, seed=5, eos_token_id=sorted(eos))
        for row, tokens in zip(new_tokens(output, FOUR), open_ended, strict=True):
            end = next((index for index, token in enumerate(tokens) if token in eos), len(tokens) - 1)
            assert row[: end + 1] == tokens[: end + 1]
            assert set(row[end + 1 :]) <= {PAD}


def test_a_longer_budget_only_appends(model):
    short = new_tokens(sample(model, FOUR, num_draft_tokens=4, seed=5, max_new_tokens=6), FOUR)
    long = new_tokens(sample(model, FOUR, num_draft_tokens=4, seed=5, max_new_tokens=14), FOUR)
    assert short == [row[:6] for row in long]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_draft_tokens", [0, 3, 6])
def test_a_row_is_the_same_alone_and_in_any_batch(model, num_draft_tokens, rule):
    settings = {"num_draft_tokens": num_draft_tokens, "temperature": 1.3, "acceptance": rule}
    together = new_tokens(sample(model, FOUR, seed=[7, 1, 99, 7], **settings), FOUR)
    for index, seed in enumerate([7, 1, 99, 7]):
        row = FOUR.row(index)
        assert new_tokens(sample(model, row, seed=[seed], **settings), row) == [together[index]]
        assert new_tokens(sample(model, row, seed=seed, **settings), row) == [together[index]]
    turned = RolePrompts(FOUR.base[::-1])
    assert new_tokens(sample(model, turned, seed=[7, 99, 1, 7], **settings), turned) == together[::-1]


def test_rows_of_one_seed_draw_their_own_noise(model):
    """One seed for the call, one prompt in every row: the rows differ. The same seed per row: they do not."""
    same = RolePrompts((FOUR.base[1],) * 4)
    rows = new_tokens(sample(model, same, seed=5, temperature=1.5), same)
    assert len({tuple(row) for row in rows}) == 4
    rows = new_tokens(sample(model, same, seed=[5] * 4, temperature=1.5), same)
    assert len({tuple(row) for row in rows}) == 1


def test_neighbouring_seeds_do_not_share_rows(model):
    """seed + row would give row 1 of seed 5 the text of row 0 of seed 6."""
    same = RolePrompts((FOUR.base[1],) * 3)
    texts = [tuple(row) for seed in (5, 6, 7) for row in new_tokens(sample(model, same, seed=seed), same)]
    assert len(set(texts)) == 9


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_repeats_the_text_and_another_changes_it(model, rule):
    settings = {"acceptance": rule, "temperature": 1.4, "num_draft_tokens": 3}
    first = new_tokens(sample(model, FOUR, seed=12, **settings), FOUR)
    torch.manual_seed(0)
    again = new_tokens(sample(model, FOUR, seed=12, **settings), FOUR)
    other = new_tokens(sample(model, FOUR, seed=13, **settings), FOUR)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_leaves_the_global_generator_alone(model, rule):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sample(model, FOUR, seed=12, acceptance=rule, num_draft_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", RULES)
def test_seeds_per_row(model, rule):
    """A row's text follows its own seed and nothing else, however long its neighbours' windows are."""
    for num_draft_tokens in (0, 3):
        settings = {"acceptance": rule, "temperature": 1.4, "num_draft_tokens": num_draft_tokens}
        first = new_tokens(sample(model, FOUR, seed=[1, 2, 3, 4], **settings), FOUR)
        other = new_tokens(sample(model, FOUR, seed=[1, 20, 3, 40], **settings), FOUR)
        assert first[1] != other[1] and first[3] != other[3]
        assert [first[0], first[2]] == [other[0], other[2]]


@pytest.mark.parametrize("rule", RULES)
def test_a_generator_repeats_the_text(model, rule):
    settings = {"acceptance": rule, "temperature": 1.4, "num_draft_tokens": 3}
    first = new_tokens(sample(model, FOUR, generator=torch.Generator().manual_seed(4), **settings), FOUR)
    torch.manual_seed(77)
    generator = torch.Generator().manual_seed(4)
    assert new_tokens(sample(model, FOUR, generator=generator, **settings), FOUR) == first
    assert new_tokens(sample(model, FOUR, generator=generator, **settings), FOUR) != first, "it did not advance"
    other = torch.Generator().manual_seed(5)
    assert new_tokens(sample(model, FOUR, generator=other, **settings), FOUR) != first


@pytest.mark.parametrize("rule", RULES)
def test_the_global_generator_repeats_the_text(model, rule):
    settings = {"acceptance": rule, "temperature": 1.4, "num_draft_tokens": 3}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(new_tokens(sample(model, FOUR, **settings), FOUR))
    following = new_tokens(sample(model, FOUR, **settings), FOUR)
    assert texts[0] == texts[1] != texts[2]
    assert following != texts[2], "two calls in a row drew the same noise"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 0, "top_p": 1e-9}, {"top_k": 0, "min_p": 1.0}], ids=str)
def test_a_filter_of_one_token_is_greedy(model, rule, settings):
    rows = greedy_rows("llama", FOUR)
    output = sample(model, FOUR, acceptance=rule, seed=3, num_draft_tokens=4, **settings)
    assert new_tokens(output, FOUR) == [row[:14] for row in rows]


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_the_same_under_every_rule(model, rule):
    rows = greedy_rows("llama", FOUR)
    for seed in (1, 2):
        output = model.generate(**FOUR.kwargs(), max_new_tokens=14, acceptance=rule, seed=seed)
        assert output[:, 9:].tolist() == [row[:14] for row in rows]


@pytest.mark.parametrize("rule", RULES)
def test_equal_models_keep_every_sampled_draft(rule):
    """p = q in exact arithmetic; a refusal here means that the draft law is not the law drawn from."""
    model = ProxyTunedModel(*tiny.same_model_trio("llama").models)
    settings = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "num_draft_tokens": 4, "max_new_tokens": 16}
    output = sample(model, FOUR, acceptance=rule, seed=8, alpha=0.5, **settings)
    assert output.speculation.num_draft_tokens >= 48
    assert output.speculation.acceptance_rate == 1.0
