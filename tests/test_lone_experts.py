"""Pairs without an anti-expert: steering by an expert alone, and contrast against an amateur (a negative strength)."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny
import torch
from drop_in import ROWS, batch, new_tokens

from specproxy import AlphaSchedule, ConfigurationError, LogitsError, PromptError, ProxyTunedModel, custom_generate
from specproxy.engine import Engine
from specproxy_kernels import LogitPair, combine_logits

COUNT = 12
INF = float("inf")


@functools.cache
def amateur() -> Any:
    return tiny.tiny_model("gpt2", layers=1, seed=71)


#: Terms of the sum, as models and strengths of expert and anti-expert.
KINDS = {
    "expert alone": [("expert", None, 0.7)],
    "contrast": [("anti_expert", None, -0.4)],
    "expert, then contrast": [("expert", "anti_expert", 1.0), ("amateur", None, -0.5)],
    "contrast, then expert": [("amateur", None, -0.5), ("expert", "anti_expert", 0.8)],
}


def part(name: str) -> Any:
    return amateur() if name == "amateur" else getattr(tiny.shared_trio("llama"), name)


@functools.cache
def model(kind: str) -> ProxyTunedModel:
    terms = [(part(expert), anti and part(anti), strength) for expert, anti, strength in KINDS[kind]]
    (expert, anti_expert, alpha), *further = terms
    return ProxyTunedModel(tiny.shared_trio("llama").base, expert, anti_expert, alpha=alpha, further_pairs=further)


@torch.no_grad()
def plain_scores(kind: str, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    scores = tiny.shared_trio("llama").base(input_ids=ids).logits
    for expert, anti_expert, strength in KINDS[kind]:
        scores = scores + strength * part(expert)(input_ids=ids).logits
        if anti_expert is not None:
            scores = scores - strength * part(anti_expert)(input_ids=ids).logits
    return scores[0]


@functools.cache
def expected(kind: str) -> list[list[int]]:
    rows = []
    for prompt in ROWS:
        tokens = list(prompt)
        for _ in range(COUNT):
            tokens.append(int(plain_scores(kind, tokens)[-1].argmax()))
        rows.append(tokens[len(prompt) :])
    return rows


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_formulas(kind, count):
    output = model(kind).generate(*batch(), max_new_tokens=COUNT, num_draft_tokens=count)
    assert new_tokens(output) == expected(kind)


def test_token_trees():
    arguments = {"max_new_tokens": COUNT, "num_draft_tokens": 4, "num_tree_tokens": 12}
    assert new_tokens(model("contrast").generate(*batch(), **arguments)) == expected("contrast")


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_coupled_tokens(kind):
    torch.testing.assert_close(model(kind).forward(torch.tensor([ROWS[0]])).logits[0], plain_scores(kind, ROWS[0]))
    sampling = {"do_sample": True, "seed": 5, "acceptance": "coupled", "max_new_tokens": COUNT}
    per_step = model(kind).generate(*batch(), num_draft_tokens=0, **sampling)
    assert torch.equal(model(kind).generate(*batch(), num_draft_tokens=4, **sampling), per_step)


def test_a_silent_anti_expert_is_none():
    base, expert, anti_expert = tiny.shared_trio("llama").models
    silent = copy.deepcopy(anti_expert)
    silent.lm_head.weight.data.zero_()
    output = ProxyTunedModel(base, expert, silent, alpha=0.7).generate(*batch(), max_new_tokens=COUNT)
    assert new_tokens(output) == expected("expert alone")


def test_what_runs_is_what_is_there():
    lone = model("expert alone")
    assert lone.anti_expert is None
    output = lone.generate(*batch(), max_new_tokens=3, return_dict_in_generate=True)
    assert set(output.speculation.seconds) == {"total", "base", "expert", "other"}


def test_prompts_and_templates_of_an_absent_anti_expert_are_refused():
    lone = model("expert alone")
    with pytest.raises(PromptError, match="anti_expert_input_ids was given, but the model has no anti_expert"):
        lone.generate(*batch(), anti_expert_input_ids=batch()[0])
    talking = ProxyTunedModel(lone.base, lone.expert, tokenizer=tiny.tiny_tokenizer())
    question = [{"role": "user", "content": "w5 w6"}]
    assert talking.chat(question, base_template="raw", max_new_tokens=3).output.sequences.shape == (1, 5)
    with pytest.raises(ConfigurationError, match="anti_expert_template was given"):
        talking.chat(question, anti_expert_template="raw")


def test_through_transformers():
    lone = model("expert alone")
    method = custom_generate(lone.expert, alpha=0.7)
    ids, mask = batch()
    output = lone.base.generate(ids, attention_mask=mask, max_new_tokens=COUNT, custom_generate=method, pad_token_id=0)
    assert new_tokens(output) == expected("expert alone")


def test_folders(tmp_path):
    trio = tiny.shared_trio("llama")
    for role in ("base", "expert"):
        getattr(trio, role).save_pretrained(tmp_path / role)
    names = {role: str(tmp_path / role) for role in ("base", "expert")}
    loaded = ProxyTunedModel.from_pretrained(**names, alpha=0.7, dtype=torch.float64, progress=False)
    assert new_tokens(loaded.generate(*batch(), max_new_tokens=COUNT)) == expected("expert alone")


def test_logits_that_overflow_together_are_the_targets():
    with pytest.raises(LogitsError, match="the logits of the target are not usable"):
        model("expert alone").generate(*batch(), alpha=1e308, max_new_tokens=3)


@pytest.mark.parametrize("alpha", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("has_anti_expert", [True, False])
def test_a_mask_is_a_mask_whatever_the_strength(alpha, has_anti_expert):
    """An expert's -inf takes an id out, also where alpha * -inf would be 0 * inf or +inf; so does the base's."""
    base, expert, anti_expert = torch.zeros(3, 1, 1, 5).double().unbind(0)
    base[..., 0] = expert[..., 1] = -INF
    expert[..., 2] = 2.0
    expert[..., 3] = anti_expert[..., 3] = -INF
    pair = LogitPair(expert, anti_expert if has_anti_expert else None, torch.full((1, 1), alpha))
    combined, bad = combine_logits(base, [pair], 5)
    assert combined.flatten().tolist() == [-INF, -INF, 2 * alpha, -INF, 0.0]
    assert not bad.any()
    for value in (INF, torch.nan):
        expert[..., 4] = value
        assert combine_logits(base, [pair], 5)[1].all()


def test_a_request_of_the_engine():
    """Without an anti-expert, under a schedule, with its prompt scored: the tokens that generate gives."""
    lone, schedule = model("expert alone"), AlphaSchedule(cutoff=5, half_life=3)
    with Engine(lone, max_batch_size=2, max_model_len=64) as engine:
        request = engine.submit(ROWS[0], max_new_tokens=COUNT, alpha_schedule=schedule, prompt_logprobs=0)
        result = request.result()
        with pytest.raises(ConfigurationError, match="alpha_schedule=5 is no schedule"):
            engine.submit(ROWS[0], alpha_schedule=5)
    expected = lone.generate(torch.tensor([ROWS[0]]), max_new_tokens=COUNT, alpha_schedule=schedule)
    assert result.tokens == expected[0, len(ROWS[0]) :].tolist()
    law = lone.forward(torch.tensor([ROWS[0]])).logits[0].detach().log_softmax(-1)
    scores = [entry.logprob for entry in result.prompt_logprobs[1:]]
    assert scores == pytest.approx([float(law[t, token]) for t, token in enumerate(ROWS[0][1:])])
