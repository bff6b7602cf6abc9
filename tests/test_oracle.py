"""The oracle against itself: with and without a cache, alone and batched, and against Transformers' own `generate`."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from transformers import GenerationConfig

from benchmarks.baselines import plain_loop_batched


@pytest.mark.parametrize("kind", tiny.SUPPORTED)
def test_cached_loop_equals_recomputation(kind):
    trio = tiny.shared_trio(kind)
    first, second, third = tiny.prompts([9, 3, 6], seed=4)
    settings = {"expert_prompt": second, "anti_expert_prompt": third, "alpha": 0.7, "repetition_penalty": 1.3}
    cached = oracle.plain_greedy(trio.models, first, max_new_tokens=12, **settings)
    assert cached == oracle.recompute_greedy(trio.models, first, max_new_tokens=12, **settings)
    assert len(set(cached)) > 2


@pytest.mark.parametrize("kind", [kind for kind in tiny.SUPPORTED if kind != "gemma2"])
def test_batched_baseline_equals_rows_alone(kind):
    # Transformers' eager attention, the only one that Gemma 2 has, gives NaN for left-padded float64 rows.
    trio = tiny.shared_trio(kind)
    rows = tiny.prompts([1, 9, 5], seed=5)
    alone = [oracle.plain_greedy(trio.models, row, max_new_tokens=10, repetition_penalty=1.2) for row in rows]
    stop = {alone[1][4]}
    alone = [oracle.cut(row, 10, stop) for row in alone]
    ids, mask = tiny.left_pad(rows, pad=7)
    batched = plain_loop_batched(
        trio.models, ids, mask, max_new_tokens=10, repetition_penalty=1.2, eos_token_id=stop, pad_token_id=0
    )
    assert torch.equal(batched, oracle.expected_output(ids, alone, pad=0))


def test_equal_pair_is_plain_greedy_of_the_base():
    base, pair = tiny.tiny_model("llama", layers=3, seed=1), tiny.tiny_model("llama", seed=2)
    (row,) = tiny.prompts([7])
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, repetition_penalty=1.4, pad_token_id=0)
    plain = base.generate(torch.tensor([row]), attention_mask=torch.ones(1, 7), generation_config=settings)
    tokens = oracle.plain_greedy((base, pair, pair), row, max_new_tokens=12, repetition_penalty=1.4)
    assert plain[0, 7:].tolist() == tokens


def test_end_of_text_stops_the_loop():
    trio = tiny.shared_trio("llama")
    (row,) = tiny.prompts([5], seed=2)
    tokens = oracle.plain_greedy(trio.models, row, max_new_tokens=12)
    stopped = oracle.plain_greedy(trio.models, row, max_new_tokens=12, eos_token_id={tokens[3]})
    assert stopped == oracle.cut(tokens, 12, {tokens[3]}) and len(stopped) <= 4


def test_target_law_is_the_filtered_softmax():
    trio = tiny.shared_trio("llama")
    (row,) = tiny.prompts([6])
    greedy = oracle.plain_greedy(trio.models, row, max_new_tokens=3)
    law = oracle.target_law(trio.models, row, greedy[:2], top_k=0)
    assert int(law.argmax()) == greedy[2]
    colder = oracle.target_law(trio.models, row, greedy[:2], temperature=0.5, top_k=3)
    kept = law.topk(3).indices
    expected = torch.zeros_like(law)
    expected[kept] = law[kept] ** 2 / (law[kept] ** 2).sum()
    torch.testing.assert_close(colder, expected)
