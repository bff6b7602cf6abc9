"""Requests through the engine: the tokens they get alone, whoever comes and goes beside them."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import tiny
import torch
from engines import PROMPTS, alone, driven

from specproxy.config import SamplingParameters
from specproxy.engine import Engine, TokenLogprob
from specproxy.errors import ConfigurationError, PromptError
from specproxy.model import ProxyTunedModel

CALLS: list[dict[str, Any]] = [{"max_new_tokens": 4 + 3 * i, "seed": i} for i in range(6)]


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("rejection", {}),
        ("rejection", {"do_sample": True, "top_k": 0}),
        ("block", {"do_sample": True, "top_k": 9}),
        ("coupled", {"do_sample": True, "temperature": 1.3}),
    ],
    ids=["greedy", "rejection", "block", "coupled"],
)
def test_tokens_are_those_of_a_call_of_one_row(rule: str, arguments: dict[str, Any]) -> None:
    with driven(max_batch_size=3, prefill_chunk=7, acceptance=rule) as engine:
        handles = []
        for prompt, call in zip(PROMPTS[:6], CALLS, strict=True):  # they come while others run, and wait for rows
            handles.append(engine.submit(prompt, **call, **arguments))
            engine.turn(2)
        outputs = engine.finish(*handles)
        engine.assert_empty()
    expected = [alone(p, acceptance=rule, **c, **arguments) for p, c in zip(PROMPTS[:6], CALLS, strict=True)]
    assert [output.tokens for output in outputs] == expected
    assert {output.finish_reason for output in outputs} == {"length"}
    assert any(output.statistics.num_accepted_tokens for output in outputs)


def test_rows_differ_in_everything_a_request_may_set() -> None:
    def bias(prefix: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + (torch.arange(scores.shape[-1]) % 3 == prefix.shape[-1] % 3) * 2.0

    def fifth(prefix: torch.Tensor, scores: Any) -> bool:
        return int(prefix[0, -1]) % 5 == 0

    end = alone(PROMPTS[0], max_new_tokens=9)[6]
    calls: list[dict[str, Any]] = [
        {"eos_token_id": end, "max_new_tokens": 40},
        {"alpha": 0.3, "num_draft_tokens": 0},
        {"num_draft_tokens": 7, "do_sample": True, "seed": 4, "top_p": 0.8},
        {"num_draft_tokens": 2, "do_sample": True, "seed": 4, "repetition_penalty": 1.3, "min_p": 0.05},
        {"role_prompts": {"expert": PROMPTS[2]}, "max_new_tokens": 11},
        {"logits_processor": [bias], "max_new_tokens": 12},
        {"stopping_criteria": [fifth], "max_new_tokens": 30},
        {"suppress_tokens": [3, 4, 5], "min_new_tokens": 5, "eos_token_id": list(range(2, 20))},
        {"alpha": [1.7], "no_repeat_ngram_size": 2},
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    with driven(max_batch_size=4) as engine:
        handles = [engine.submit(prompt, **call) for prompt, call in zip(prompts, calls, strict=True)]
        outputs = engine.finish(*handles)
    for prompt, call, output in zip(prompts, calls, outputs, strict=True):
        if "alpha" in call:
            call["alpha"] = torch.tensor(call["alpha"]).flatten().tolist()
        assert output.tokens == alone(prompt, **call), call
    assert outputs[0].tokens[-1] == end and outputs[0].finish_reason == "stop"
    assert outputs[1].statistics.num_draft_tokens == 0
    assert len(outputs[2].statistics.drafted_per_position) == 7
    assert len(outputs[3].statistics.drafted_per_position) == 2


def test_ends_by_token_ids() -> None:
    text = alone(PROMPTS[0], max_new_tokens=12)
    with driven() as engine:
        stopped = engine.submit(PROMPTS[0], max_new_tokens=12, stop_token_ids=[text[5]])
        ignoring = engine.submit(PROMPTS[0], max_new_tokens=12, eos_token_id=text[2], ignore_eos=True)
        both = engine.submit(
            PROMPTS[0], max_new_tokens=12, eos_token_id=text[2], ignore_eos=True, stop_token_ids=[text[5]]
        )
        outputs = engine.finish(stopped, ignoring, both)
    first = text.index(text[5]) + 1
    assert [output.tokens for output in outputs] == [text[:first], text, text[:first]]
    assert [output.finish_reason for output in outputs] == ["stop", "length", "stop"]


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_neighbour_at_its_last_position_narrows_no_window(kind: str) -> None:
    """Learned positions end: drafts that stand past them belong to no row, and must neither fail nor hold others back.

    Under `rejection` a text changes with its windows, so equality with the call alone shows that they were the same.
    """
    proxy = engines.model(kind)
    limit = min(model.config.max_position_embeddings for model in tiny.shared_trio(kind).models)
    long = tiny.prompts([limit - 6], seed=1)[0]
    sampling = {"do_sample": True, "top_k": 0, "seed": 2}
    with driven(proxy, max_batch_size=2, prefill_chunk=1000) as engine:
        # Without drafts of its own it comes to stand at each of the last positions, in windows of five.
        handles = [engine.submit(long, max_new_tokens=6, num_draft_tokens=0, **sampling)]
        handles.append(engine.submit(PROMPTS[0], max_new_tokens=20, **sampling))
        outputs = engine.finish(*handles)
    assert outputs[0].tokens == alone(long, proxy, max_new_tokens=6, num_draft_tokens=0, **sampling)
    assert outputs[1].tokens == alone(PROMPTS[0], proxy, max_new_tokens=20, **sampling)


def test_auto_keeps_greedy_and_coupled_texts() -> None:
    for rule, arguments in (("rejection", {}), ("coupled", {"do_sample": True})):
        with driven(num_draft_tokens="auto", acceptance=rule) as engine:
            handles = [engine.submit(p, **c, **arguments) for p, c in zip(PROMPTS[:6], CALLS, strict=True)]
            outputs = engine.finish(*handles)
            windows = engine.engine.stats().windows
        expected = [alone(p, acceptance=rule, **c, **arguments) for p, c in zip(PROMPTS[:6], CALLS, strict=True)]
        assert [output.tokens for output in outputs] == expected
        assert sum(windows.values()) == engine.engine.stats().cycles > 0


def test_a_long_prompt_holds_nobody_up() -> None:
    """Turns are counted, not seconds: while 60 tokens are read 5 at a time, the row in flight moves every turn."""
    long = tiny.prompts([61], seed=9)[0]
    with driven(prefill_chunk=5, num_draft_tokens=1) as engine:
        first = engine.submit(PROMPTS[4], max_new_tokens=60)
        engine.turn()
        second = engine.submit(long, max_new_tokens=8)
        moved = []
        while second.output is None and not engine.scheduler.running.get(1):
            before = len(engine.scheduler.running[0].row.tokens)
            engine.turn()
            moved.append(len(engine.scheduler.running[0].row.tokens) - before)
        assert len(moved) == 12 and min(moved) >= 1
        outputs = engine.finish(first, second)
    assert [output.tokens for output in outputs] == [
        alone(PROMPTS[4], max_new_tokens=60),
        alone(long, max_new_tokens=8),
    ]


def test_blocks_are_cycles_and_add_up() -> None:
    with driven() as engine:
        handle = engine.submit(PROMPTS[1], max_new_tokens=17, request_id="mine")
        engine.turn()
        first = next(handle)
        assert first.tokens and handle.output is None
        (output,) = engine.finish(handle)
        blocks = [first, *handle]
    assert [token for block in blocks for token in block.tokens] == output.tokens
    assert (
        [source for block in blocks for source in block.sources] == output.sources == output.statistics.token_sources[0]
    )
    assert len(blocks) == output.statistics.num_cycles and output.request_id == handle.request_id == "mine"
    assert all(block.sources[:-1] == ("draft",) * (len(block.sources) - 1) for block in blocks)
    assert sum(block.num_draft_tokens for block in blocks) == output.statistics.num_draft_tokens
    for block in blocks:
        assert block.drafter == ("expert" if block.num_draft_tokens else None)
        if block.sources[-1] == "target":
            assert len(block.refused) == block.num_draft_tokens - block.sources.count("draft")
            assert block.refused[:1] != block.tokens[-1:], "a refused draft came after all"
        else:
            assert block.refused == (), "what lies behind the end was not refused"
    assert any(block.refused for block in blocks)
    timings = output.timings
    assert timings.started is not None and timings.first_token is not None and timings.ended is not None
    assert timings.submitted <= timings.started <= timings.first_token <= timings.ended
    assert (output.num_prompt_tokens, output.statistics.num_new_tokens) == (30, 17)


def _expected_logprobs(ids: list[int], top: int) -> list[TokenLogprob]:
    """Of every token but the first, from one plain forward of the three models."""
    law = engines.model().forward(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    entries = []
    for position, token in enumerate(ids[1:]):
        values, indices = law[position].sort(descending=True)
        best = tuple(zip(indices[:top].tolist(), values[:top].tolist(), strict=True))
        entries.append(TokenLogprob(token, float(law[position, token]), int((indices == token).nonzero()) + 1, best))
    return entries


def _assert_close(given: list[TokenLogprob], expected: list[TokenLogprob]) -> None:
    assert [(e.token, e.rank, [i for i, _ in e.top]) for e in given] == [
        (e.token, e.rank, [i for i, _ in e.top]) for e in expected
    ]
    flat = [[[e.logprob, *(value for _, value in e.top)] for e in entries] for entries in (given, expected)]
    torch.testing.assert_close(torch.tensor(flat[0]), torch.tensor(flat[1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "seed": 1, "temperature": 0.7, "top_k": 4}])
def test_logprobs_are_those_of_the_combined_law(arguments: dict[str, Any]) -> None:
    """The law before processors, temperature and filters, of the prompt and of new tokens, drafts included."""
    prompt = PROMPTS[3]
    with driven(prefill_chunk=6) as engine:
        other = engine.submit(PROMPTS[0], max_new_tokens=15, seed=3, do_sample=True)
        handle = engine.submit(prompt, max_new_tokens=13, logprobs=3, prompt_logprobs=3, **arguments)
        output, neighbour = engine.finish(handle, other)
        blocks = list(handle)
        none = engine.submit(prompt, max_new_tokens=0, prompt_logprobs=0)
        (scored,) = engine.finish(none)
    assert output.tokens == alone(prompt, max_new_tokens=13, **arguments)
    assert neighbour.tokens == alone(PROMPTS[0], max_new_tokens=15, seed=3, do_sample=True)
    expected = _expected_logprobs(prompt + output.tokens, 3)
    assert output.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    _assert_close(output.prompt_logprobs[1:] + output.logprobs, expected)  # type: ignore[arg-type]
    assert [entry for block in blocks for entry in block.logprobs or ()] == output.logprobs
    assert neighbour.logprobs is None and neighbour.prompt_logprobs is None
    assert (scored.tokens, scored.finish_reason) == ([], "length")
    assert scored.prompt_logprobs is not None
    _assert_close(scored.prompt_logprobs[1:], [e._replace(top=()) for e in expected[: len(prompt) - 1]])  # type: ignore[arg-type]


def test_sampling_parameters_in_one_piece() -> None:
    sampling = SamplingParameters(do_sample=True, temperature=0.8, top_k=None, min_p=0.1)
    with driven() as engine:
        (output,) = engine.finish(engine.submit(PROMPTS[0], max_new_tokens=15, sampling=sampling, seed=6))
    given = {"do_sample": True, "temperature": 0.8, "top_k": 0, "min_p": 0.1}
    assert output.tokens == alone(PROMPTS[0], max_new_tokens=15, seed=6, **given)


def test_seeds_and_their_absence() -> None:
    with driven() as engine:
        handles = [engine.submit(PROMPTS[0], max_new_tokens=24, do_sample=True) for _ in range(3)]
        texts = {tuple(output.tokens) for output in engine.finish(*handles)}
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("prompt", "arguments", "match"),
    [
        ([], {}, "non-empty sequence of token ids"),
        ("text", {}, "non-empty sequence of token ids"),
        ([3, 1.5], {}, "holds 1.5"),
        ([3, True], {}, "holds True"),
        (torch.ones(2, 3, dtype=torch.long), {}, r"shape \[2, 3\]"),
        ([3, 40], {}, "id 40, outside the base's vocabulary of 40"),
        ([3], {"role_prompts": {"expert": [99]}}, "id 99, outside the expert's"),
        ([3], {"role_prompts": {"base": [3]}}, "names 'base'"),
        ([3] * 30, {"max_new_tokens": 40}, "max_model_len=64; shorten the prompt or ask for at most 34"),
        ([3], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([3], {"num_draft_tokens": "auto"}, "num_draft_tokens='auto'"),
        ([3], {"num_draft_tokens": 64}, "at most 63"),
        ([3], {"deadline": 0}, "deadline=0"),
        ([3], {"logprobs": -1}, "logprobs=-1"),
        ([3], {"logprobs": 101}, "at most 100"),
        ([3], {"prompt_logprobs": 1, "role_prompts": {"expert": [4]}}, "one prompt for all roles"),
        ([3], {"seed": 1.5}, "seed=1.5"),
        ([3], {"alpha": [1.0, 2.0]}, "2 values"),
        ([3], {"ignore_eos": 1}, "ignore_eos=1"),
        ([3], {"stop_token_ids": ["x"]}, "stop_token_ids='x'"),
        ([3], {"stop_strings": ["x"]}, "knows token ids alone"),
        ([3], {"max_time": 3.0}, "use deadline"),
        ([3], {"num_beams": 2}, "beam search"),
        ([3], {"colour": "red"}, "colour='red'"),
        ([3], {"sampling": SamplingParameters(), "top_k": 3}, "both given"),
        ([3], {"sampling": {"top_k": 3}}, "must be SamplingParameters"),
    ],
)
def test_bad_requests_are_refused_at_once(prompt: Any, arguments: dict[str, Any], match: str) -> None:
    engine = Engine(engines.model(), max_model_len=64)
    with pytest.raises((ConfigurationError, PromptError), match=match):
        engine.submit(prompt, **arguments)
    assert engine._shared.thread is None and engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"prefix_cache": -1}, "prefix_cache=-1"),
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"max_model_len": 4000}, "exceeds the 128 positions"),
        ({"num_draft_tokens": "some"}, "num_draft_tokens='some'"),
        ({"acceptance": "never"}, "acceptance='never'"),
        ({"cuda_graphs": True}, None),
    ],
)
def test_bad_engines_are_refused(options: dict[str, Any], match: str | None) -> None:
    if match is not None:
        with pytest.raises(ConfigurationError, match=match):
            Engine(engines.model(), **options)
        return
    engine = Engine(engines.model(), **options)  # only the loop's thread finds that this cannot be had
    output = engine.submit([3, 4]).result(60)
    assert output.finish_reason == "error" and "cuda_graphs=True" in str(output.error)
    assert engine.health.state == "dead"


def test_an_engine_takes_a_model() -> None:
    with pytest.raises(ConfigurationError, match="must be a ProxyTunedModel"):
        Engine(engines.model().base)  # type: ignore[arg-type]


def test_rows_wait_for_positions() -> None:
    with driven(max_batch_size=4, max_total_tokens=50) as engine:
        handles = [engine.submit(PROMPTS[0], max_new_tokens=15) for _ in range(5)]  # 20 positions each
        engine.turn()
        assert len(engine.scheduler.running) == 2 and engine.engine.stats().waiting == 3
        large = engine.submit(PROMPTS[6], max_new_tokens=20)  # more than all, so it runs alone
        outputs = engine.finish(*handles, large)
    assert all(output.tokens == alone(PROMPTS[0], max_new_tokens=15) for output in outputs[:5])
    assert outputs[5].tokens == alone(PROMPTS[6], max_new_tokens=20)


def test_several_pairs() -> None:
    first, second = tiny.shared_trio("llama"), tiny.shared_trio("llama", seed=20)
    proxy = ProxyTunedModel(*first.models, further_pairs=[(second.expert, second.anti_expert, 0.5)])
    with driven(proxy) as engine:
        strengths = [None, [0.0, 1.0], 0.4]
        handles = [engine.submit(PROMPTS[0], max_new_tokens=12, alpha=alpha) for alpha in strengths]
        outputs = engine.finish(*handles)
    given = [None, [[0.0, 1.0]], 0.4]
    assert [o.tokens for o in outputs] == [alone(PROMPTS[0], proxy, max_new_tokens=12, alpha=a) for a in given]
