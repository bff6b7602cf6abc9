"""Rows that are held to a grammar: tokens equal to per-step decoding, the joint law, and a grammar that fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chi_square
import engines
import loop_law
import numpy as np
import pytest
import tiny
import torch
from toy_grammar import END, Steps, allows, is_legal

from specproxy import ConfigurationError, ProxyTunedModel
from specproxy.grammar import allowed_words


def masked(prompt_length: int, vocab: int, end: int | None) -> Any:
    """The same as one of Transformers' processors: the oracle."""

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        allowed[allows(input_ids[0, prompt_length:].tolist(), vocab, end)] = True
        return scores.masked_fill(~allowed, -torch.inf)

    return process


# Equality.

PROMPT = torch.tensor([[3, 9, 14, 2, 9, 14, 2]])
LAWS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "acceptance": "coupled", "top_k": 0, "seed": 3},
    {"do_sample": True, "acceptance": "coupled", "top_k": 5, "top_p": 0.9, "temperature": 1.5, "seed": 4},
    {"do_sample": True, "acceptance": "coupled", "top_k": 0, "typical_p": 0.8, "seed": 5},  # filters in Python
    {"repetition_penalty": 1.3, "suppress_tokens": [4, 20]},
]
DRAFTING: list[dict[str, Any]] = [
    {"num_draft_tokens": 4},
    {"num_draft_tokens": 5, "drafter": "lookup"},
    {"num_draft_tokens": 4, "drafter": "cascade"},
    {"num_draft_tokens": 3, "num_tree_tokens": 9},
    {"num_draft_tokens": "auto"},
]


@pytest.fixture(scope="module")
def model() -> ProxyTunedModel:
    return ProxyTunedModel(*tiny.shared_trio("llama").models)


def generate(model: ProxyTunedModel, prompt: torch.Tensor = PROMPT, **arguments: Any) -> list[int]:
    output = model.generate(prompt, max_new_tokens=30, eos_token_id=END, return_dict_in_generate=True, **arguments)
    return output.sequences[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("law", LAWS, ids=["greedy", "coupled", "filters", "typical", "penalty"])
def test_tokens_equal_per_step_and_a_processor(model: ProxyTunedModel, law: dict[str, Any]) -> None:
    expected = generate(
        model, num_draft_tokens=0, logits_processor=[masked(PROMPT.shape[1], tiny.VOCAB_SIZE, END)], **law
    )
    assert is_legal(expected) and len(expected) > 5
    assert generate(model, num_draft_tokens=0, grammar=Steps(), **law) == expected
    for drafting in DRAFTING:
        grammar = Steps()
        assert generate(model, grammar=grammar, **law, **drafting) == expected, drafting
        # A grammar is asked about its own texts alone, none of them behind an end token.
        assert all(is_legal(asked) and END not in asked for asked in grammar.asked)


def test_the_grammar_is_what_makes_the_tokens(model: ProxyTunedModel) -> None:
    assert not is_legal(generate(model))


def test_a_batch_mixes_rows_with_and_without(model: ProxyTunedModel) -> None:
    """In an engine every request has its own, and a neighbour's changes nothing."""
    with engines.driven() as driven:
        prompt = PROMPT[0].tolist()
        held = driven.submit(prompt, max_new_tokens=30, eos_token_id=END, grammar=Steps())
        free = driven.submit(prompt, max_new_tokens=30, eos_token_id=END)
        driven.finish()
        assert held.result().tokens == generate(model, num_draft_tokens=0, grammar=Steps())
        assert free.result().tokens == generate(model, num_draft_tokens=0)


# The joint law.


def held(law: np.ndarray) -> np.ndarray:
    """A joint law [V] * n of free tokens as it becomes where every token is drawn from those that are allowed."""
    vocab, length = law.shape[0], law.ndim
    result = np.zeros_like(law)
    for tokens in np.ndindex(*law.shape):
        mass = 1.0
        for i in range(length):
            allowed = allows(tokens[:i], vocab, None)
            steps = law[tokens[:i]].reshape(vocab, -1).sum(-1)
            mass *= steps[tokens[i]] / steps[allowed].sum() if tokens[i] in allowed else 0.0
        result[tokens] = mass
    return result


LAW_CASES = [
    loop_law.LoopCase("rejection", 2, extra=2),
    loop_law.LoopCase("rejection", 3, drafting={"drafter": "lookup"}, seed=1, extra=2),
    loop_law.LoopCase("block", 3, seed=1, extra=2),
]


@pytest.mark.parametrize("case", LAW_CASES, ids=str)
def test_tokens_follow_the_held_law(case: loop_law.LoopCase) -> None:
    """Against full enumeration; drafts that oppose the target are refused on the way."""
    grammar = Steps(vocab=5, end=None)
    drawn = loop_law.sample(
        ProxyTunedModel,
        loop_law.LoopCase(**{**case.__dict__, "drafting": {**case.drafting, "grammar": grammar}}),
        800,
        seed=5,
    )
    for prompt, tokens in zip(loop_law.PROMPTS, drawn, strict=True):
        law = held(loop_law.exact_law(case, prompt))
        np.testing.assert_allclose(law.sum(), 1)
        free = loop_law.exact_law(case, prompt)
        assert chi_square.total_variation(law, free) > 0.2  # the grammar matters
        assert law[tuple(tokens.T)].min() > 0 and chi_square.p_value(tokens, law) > chi_square.LEVEL


# Masks of a window.


def test_positions_behind_an_end_or_a_forbidden_draft_are_open() -> None:
    grammar = Steps()
    size = -(-tiny.VOCAB_SIZE // 32)

    def masks(drafts: list[int], reach: int = 9, tokens: Sequence[int] = (1, 2, 4, 5)) -> list[bool]:
        words = allowed_words(grammar, tokens, drafts, {END}, reach, size)
        is_open = []
        for position, line in enumerate(words):
            is_open.append(bool((line == -1).all()))
            if not is_open[-1]:
                text = [*tokens, *drafts[:position]]
                assert line.equal(grammar.mask(text))
        return is_open

    assert masks([8, END, 3]) == [False, False, True, True]  # 5 tokens: the end may come
    assert masks([8, 30, 31]) == [False, False, True, True]  # 30 is too far
    assert masks([8, 10, 11], reach=2) == [False, False, True, True]
    assert masks([8, -1]) == [False, False, True] and masks([99 * 32]) == [False, True]
    short = allowed_words(grammar, [1], [], {END}, 1, size + 3)
    assert short.shape == (1, size + 3) and not short[0, size:].any()


# Failures.


class Broken(Steps):
    """A grammar that fails behind three tokens."""

    def mask(self, tokens: Sequence[int]) -> torch.Tensor:
        if len(tokens) >= 3:
            raise RuntimeError("too complex")
        return super().mask(tokens)


def test_a_grammar_that_fails_ends_its_own_request_alone(model: ProxyTunedModel) -> None:
    prompt = PROMPT[0].tolist()
    for law in ({}, {"do_sample": True, "top_k": 0, "seed": 1}, {"do_sample": True, "typical_p": 0.8, "seed": 1}):
        with engines.driven() as driven:
            broken = driven.submit(prompt, max_new_tokens=20, grammar=Broken(end=None), **law)
            healthy = driven.submit(prompt, max_new_tokens=20, grammar=Steps(), eos_token_id=END)
            outputs = driven.finish(broken, healthy)
        assert outputs[0].finish_reason == "error" and "too complex" in str(outputs[0].error)
        assert len(outputs[0].tokens) == 3 and is_legal(outputs[0].tokens, end=None)
        assert (
            outputs[1].tokens
            == model.generate(PROMPT, max_new_tokens=20, grammar=Steps(), eos_token_id=END, num_draft_tokens=0)[
                0, PROMPT.shape[1] :
            ].tolist()
        )


def test_what_is_no_grammar_is_refused(model: ProxyTunedModel) -> None:
    with pytest.raises(ConfigurationError, match="is no grammar"):
        model.generate(PROMPT, grammar="json")
    with engines.driven() as driven:
        for fields in ({"ignore_eos": True}, {"min_new_tokens": 2}):
            with pytest.raises(ConfigurationError, match="a grammar decides"):
                driven.submit([1], max_new_tokens=4, grammar=Steps(), **fields)
