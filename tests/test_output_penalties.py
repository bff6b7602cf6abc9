"""Presence and frequency penalties and token biases through the decode loop, exact under speculation.

The oracle is a plain loop without a cache in which the penalties are counted anew at every step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import drop_in
import pytest
import tiny
import torch
from drop_in import PAD, ROWS, batch, model, new_tokens
from transformers import RepetitionPenaltyLogitsProcessor

from specproxy import ConfigurationError, ProxyTunedModel

LENGTH = 20
BIAS = {(5,): 2.5, (9,): -4.0, (21,): 1.5, (30,): -100.0}
CASES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.9},
    "reward": {"frequency_penalty": -0.6},
    "bias": {"sequence_bias": BIAS},
    "all": {"presence_penalty": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "sequence_bias": BIAS},
}


def oracle_rows(case: dict[str, Any], count: int = LENGTH) -> list[list[int]]:
    """Greedy tokens of every row: bias, repetition penalty, counted penalties, in this order."""

    def processor(length: int) -> Any:
        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            for (token,), value in case.get("sequence_bias", {}).items():
                scores[:, token] += value
            if "repetition_penalty" in case:
                scores = RepetitionPenaltyLogitsProcessor(case["repetition_penalty"])(ids, scores)
            for token, times in Counter(ids[0, length:].tolist()).items():
                scores[:, token] -= case.get("presence_penalty", 0) + times * case.get("frequency_penalty", 0)
            return scores

        return process

    models = tiny.shared_trio("llama").models
    return [drop_in.plain_loop(models, row, count, processor(len(row))) for row in ROWS]


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_oracle(name: str) -> None:
    expected = oracle_rows(CASES[name])
    assert expected != oracle_rows({})
    for count in (0, 1, 4, "auto"):
        output = model().generate(*batch(), max_new_tokens=LENGTH, num_draft_tokens=count, **CASES[name])
        assert new_tokens(output) == expected, f"{count} drafts"
    tree = model().generate(*batch(), max_new_tokens=LENGTH, num_draft_tokens=3, num_tree_tokens=8, **CASES[name])
    assert new_tokens(tree) == expected, "a tree, whose branches each have a prefix of their own"


@pytest.mark.parametrize("name", CASES)
def test_coupled_tokens_equal_per_step(name: str) -> None:
    settings = {"do_sample": True, "acceptance": "coupled", "temperature": 1.3, "seed": 3, "max_new_tokens": LENGTH}
    per_step, *others = (
        model().generate(*batch(), num_draft_tokens=count, **settings, **CASES[name]) for count in (0, 1, 5)
    )
    for other in others:
        assert torch.equal(other, per_step)


def unchanged(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Asks for Python in the loop and changes nothing."""
    return scores


@pytest.mark.parametrize("name", ["frequency", "all"])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_with_processors_follow_the_same_law(name: str, sampled: bool) -> None:
    settings: dict[str, Any] = {"max_new_tokens": LENGTH, **CASES[name]}
    if sampled:
        settings |= {"do_sample": True, "acceptance": "coupled", "seed": 8, "temperature": 0.8, "typical_p": 1.0}
    vectorised = model().generate(*batch(), **settings)
    assert torch.equal(model().generate(*batch(), logits_processor=[unchanged], **settings), vectorised)


def test_counts_come_before_a_filter_in_python() -> None:
    """A filter without a vectorised form sees penalised scores: the coupled tokens of the oracle's chain."""
    settings = {"do_sample": True, "seed": 8, "max_new_tokens": LENGTH, "frequency_penalty": 1.1, "top_k": 0}
    wide = model().generate(*batch(), acceptance="coupled", epsilon_cutoff=1e-9, **settings)
    assert torch.equal(wide, model().generate(*batch(), acceptance="coupled", **settings))


def test_single_tokens_leave_python_out_of_the_loop() -> None:
    """A bias of single tokens costs no processor, one of longer sequences does; Transformers' own agrees."""
    long = {**BIAS, (3, 4): 1e-9}
    fast = model().generate(*batch(), max_new_tokens=LENGTH, sequence_bias=BIAS)
    assert torch.equal(model().generate(*batch(), max_new_tokens=LENGTH, sequence_bias=long), fast)
    base = tiny.shared_trio("llama").base
    alone = ProxyTunedModel(*tiny.shared_trio("llama").models, alpha=0.0)
    for row in ROWS:
        ids = torch.tensor([row])
        theirs = base.generate(ids, max_new_tokens=LENGTH, do_sample=False, sequence_bias=BIAS, pad_token_id=PAD)
        assert torch.equal(alone.generate(ids, max_new_tokens=LENGTH, sequence_bias=BIAS), theirs)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", True])
def test_penalties_must_be_finite(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        model().generate(*batch(), **{name: value})


def test_a_bias_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ConfigurationError, match=rf"sequence_bias holds id {tiny.VOCAB_SIZE}"):
        model().generate(*batch(), sequence_bias={(tiny.VOCAB_SIZE,): 1.0})
