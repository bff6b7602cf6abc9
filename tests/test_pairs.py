"""Several pairs, and strengths that differ by row: the plain formula, and the same tokens whatever the window."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from drop_in import ROWS, batch, new_tokens

from specproxy import ConfigurationError, ProxyTunedModel

COUNT = 12
STRENGTHS = (0.8, -0.6, 1.1)


@functools.cache
def pair(seed):
    """A further expert and its anti-expert, of another architecture where the seed is odd."""
    kind = "gpt2" if seed % 2 else "llama"
    anti_expert = tiny.tiny_model(kind, layers=1, seed=50 + seed)
    return tiny.tiny_model(kind, layers=1, seed=60 + seed), anti_expert


@functools.cache
def model(pairs=3, strengths=STRENGTHS):
    trio = tiny.shared_trio("llama")
    further = [(*pair(seed), strength) for seed, strength in enumerate(strengths[1:pairs], start=1)]
    return ProxyTunedModel(*trio.models, alpha=strengths[0], further_pairs=further)


@torch.no_grad()
def plain_scores(tokens, pairs=3, strengths=STRENGTHS):
    """s_base + the sum of alpha * (s_expert - s_anti) at every position, from plain forwards."""
    base, *first = tiny.shared_trio("llama").models
    ids = torch.tensor([tokens])
    scores = base(input_ids=ids, use_cache=False).logits
    for (expert, anti_expert), strength in zip([first, pair(1), pair(2)][:pairs], strengths, strict=False):
        scores = scores + strength * (expert(input_ids=ids).logits - anti_expert(input_ids=ids).logits)
    return scores[0]


def plain_greedy(prompt, pairs=3, strengths=STRENGTHS):
    tokens = list(prompt)
    for _ in range(COUNT):
        tokens.append(int(plain_scores(tokens, pairs, strengths)[-1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def expected(pairs=3, strengths=STRENGTHS):
    return [plain_greedy(prompt, pairs, strengths) for prompt in ROWS]


@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 4, "auto"])
def test_greedy_tokens_are_the_formulas(pairs, count):
    output = model(pairs).generate(*batch(filler=39), max_new_tokens=COUNT, num_draft_tokens=count)
    assert new_tokens(output) == expected(pairs)


def test_every_pair_matters():
    assert expected(1) != expected(2) != expected(3) != expected(1)


def test_forward_and_recorded_logits_are_the_formulas():
    recorded = {"return_dict_in_generate": True, "output_logits": True}
    output = model().generate(*batch(), max_new_tokens=COUNT, num_draft_tokens=3, **recorded)
    for row, (prompt, tokens) in enumerate(zip(ROWS, expected(), strict=True)):
        plain = plain_scores(prompt + tokens)
        torch.testing.assert_close(model().forward(torch.tensor([prompt + tokens])).logits[0], plain)
        for t, logits in enumerate(output.logits):
            torch.testing.assert_close(logits[row], plain[len(prompt) + t - 1].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.4, "top_k": 10, "repetition_penalty": 1.3}, {"typical_p": 0.8}], ids=str
)
def test_coupled_tokens_do_not_depend_on_the_window(settings):
    sampling = {"do_sample": True, "seed": 5, "acceptance": "coupled", "max_new_tokens": COUNT, **settings}
    per_step = model().generate(*batch(), num_draft_tokens=0, **sampling)
    for count in (1, 4, 7):
        assert torch.equal(model().generate(*batch(), num_draft_tokens=count, **sampling), per_step), count
    assert not torch.equal(model(1).generate(*batch(), num_draft_tokens=0, **sampling), per_step)


def test_two_halves_are_one_whole():
    base, expert, anti_expert = tiny.shared_trio("llama").models
    halves = ProxyTunedModel(base, expert, anti_expert, alpha=0.4, further_pairs=[(expert, anti_expert, 0.6)])
    for count in (0, 4):
        output = halves.generate(*batch(), max_new_tokens=COUNT, num_draft_tokens=count)
        assert new_tokens(output) == expected(1, (1.0,))


def test_opposite_pairs_cancel():
    base, expert, anti_expert = tiny.shared_trio("llama").models
    nothing = ProxyTunedModel(base, expert, anti_expert, alpha=0.7, further_pairs=[(anti_expert, expert, 0.7)])
    output = nothing.generate(*batch(), max_new_tokens=COUNT)
    assert new_tokens(output) == expected(1, (0.0,))
    assert expected(1, (0.0,)) != expected(1, (0.7,))


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_strengths_by_row_equal_rows_alone(kind, count):
    """[B] sets the first pair alone; the others keep their own."""
    strengths = [0.0, 1.5, -0.5]
    output = model().generate(*batch(), alpha=kind(strengths), max_new_tokens=COUNT, num_draft_tokens=count)
    rows = new_tokens(output)
    for row, (prompt, strength) in enumerate(zip(ROWS, strengths, strict=True)):
        alone = model().generate(torch.tensor([prompt]), alpha=strength, max_new_tokens=COUNT)
        assert rows[row] == alone[0, len(prompt) :].tolist()
        assert rows[row] == plain_greedy(prompt, strengths=(strength, *STRENGTHS[1:]))
    assert rows != expected()


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_strengths_by_row_and_pair_equal_rows_alone(kind, count):
    strengths = [[0.0, 0.0, 0.0], [1.0, 0.5, -1.0], [-0.3, 0.9, 0.2]]
    rows = new_tokens(model().generate(*batch(), alpha=kind(strengths), max_new_tokens=COUNT, num_draft_tokens=count))
    for row, (prompt, own) in enumerate(zip(ROWS, strengths, strict=True)):
        alone = model().generate(torch.tensor([prompt]), alpha=[own], max_new_tokens=COUNT)
        assert rows[row] == alone[0, len(prompt) :].tolist() == plain_greedy(prompt, strengths=tuple(own))
    assert len({tuple(row) for row in rows}) == 3 and rows != expected()


def test_strengths_of_prompts_hold_for_all_their_sequences():
    sampling = {"do_sample": True, "acceptance": "coupled", "num_return_sequences": 2, "max_new_tokens": COUNT}
    per_prompt = model().generate(*batch(), alpha=[0.0, 1.0, 2.0], seed=3, **sampling)
    per_row = model().generate(*batch(), alpha=[0.0, 0.0, 1.0, 1.0, 2.0, 2.0], seed=3, **sampling)
    assert torch.equal(per_prompt, per_row)
    assert not torch.equal(per_prompt, model().generate(*batch(), alpha=[2.0, 1.0, 0.0], seed=3, **sampling))


def test_sampled_rows_with_their_own_strengths_equal_rows_alone():
    strengths, seeds = [0.0, 1.5, -0.5], [7, 8, 9]
    sampling = {"do_sample": True, "acceptance": "coupled", "max_new_tokens": COUNT}
    rows = new_tokens(model().generate(*batch(), alpha=strengths, seed=seeds, **sampling))
    for row, prompt in enumerate(ROWS):
        ids = torch.tensor([prompt])
        alone = model().generate(ids, alpha=strengths[row], seed=[seeds[row]], num_draft_tokens=0, **sampling)
        assert rows[row] == alone[0, len(prompt) :].tolist()


def test_a_pairs_strength_is_checked():
    trio = tiny.shared_trio("llama")
    with pytest.raises(ConfigurationError, match="alpha=nan"):
        ProxyTunedModel(*trio.models, further_pairs=[(*pair(2), float("nan"))])
    with pytest.raises(ConfigurationError, match="2 values in a row for 3 pairs"):
        model().generate(*batch(), alpha=[[1.0, 2.0]] * 3)
