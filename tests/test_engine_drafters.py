"""Drafters and trees in the engine: what each keeps of a row follows it through joins, leaves and cancellations."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny
import torch
from engines import PROMPTS, Driven, alone, driven

from specproxy import LookupCorpus, ProxyTunedModel
from specproxy.draft import assistant as assistant_module
from specproxy.engine import Engine, RequestHandle
from specproxy.errors import ConfigurationError, PromptError
from specproxy.runner import Runner

CALLS: list[dict[str, Any]] = [{"max_new_tokens": 4 + 4 * i, "seed": i} for i in range(7)]
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_k": 9}


@functools.cache
def model(assistant_kind: str = "llama") -> ProxyTunedModel:
    """A trio and an assistant that agrees with it now and then: a part of it, or of another architecture."""
    trio = tiny.shared_trio("llama")
    helper = trio.anti_expert if assistant_kind == "llama" else tiny.shared_trio(assistant_kind).expert
    return ProxyTunedModel(*trio.models, assistant=helper)


@functools.cache
def equal_models() -> ProxyTunedModel:
    """Of one law: every draft of the assistant survives, unless what it remembers of a row is not the row's."""
    trio = tiny.same_model_trio("gpt2")
    return ProxyTunedModel(*trio.models, assistant=trio.base)


@functools.cache
def corpus() -> LookupCorpus:
    """Texts that requests will write, some tokens changed, so that lookup is now right and now wrong."""
    texts = LookupCorpus()
    for prompt, call in zip(PROMPTS, CALLS, strict=False):
        text = alone(prompt, model(), **call)
        texts.add([*prompt, *(token if i % 5 else (token + 1) % 40 for i, token in enumerate(text, start=1))])
    return texts


def traffic(engine: Driven, calls: list[dict[str, Any]], **arguments: Any) -> list[RequestHandle]:
    """Requests that come while others run and wait for rows, with one among them that is cancelled on its way."""
    handles = []
    for number, (prompt, call) in enumerate(zip(PROMPTS, calls, strict=False)):
        handles.append(engine.submit(prompt, **call, **arguments))
        if number == 2:
            unwanted = engine.submit(PROMPTS[5], max_new_tokens=60, **arguments)
        engine.turn(2)
    unwanted.cancel()
    engine.finish(*handles)
    assert unwanted.result(0).finish_reason == "cancelled" and unwanted.result(0).tokens
    return handles


DRAFTERS: dict[str, dict[str, Any]] = {
    "lookup": {"drafter": "lookup"},
    "cascade": {"drafter": "cascade"},
    "assistant": {"drafter": "assistant"},
}


@pytest.mark.parametrize("rule", ["greedy", "rejection", "block", "coupled"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_are_those_of_a_call_of_one_row(drafter: str, rule: str) -> None:
    arguments = {} if rule == "greedy" else SAMPLED
    shared = {"acceptance": "rejection" if rule == "greedy" else rule, "drafter": drafter}
    with driven(model(), max_batch_size=3, prefill_chunk=7, corpus=corpus(), **shared) as engine:
        outputs = [handle.result(0) for handle in traffic(engine, CALLS, **arguments)]
        engine.assert_empty()
        counts = engine.engine.stats().speculation.drafters
    shared |= {"corpus": corpus(), **arguments}
    expected = [alone(p, model(), **c, **shared) for p, c in zip(PROMPTS, CALLS, strict=False)]
    assert [output.tokens for output in outputs] == expected
    # The cascade's drafts count as its own, whoever guessed them.
    assert set(counts) == {drafter} and 0 < counts[drafter].num_accepted_tokens < counts[drafter].num_draft_tokens


@pytest.mark.parametrize("drafter", [None, *DRAFTERS])
def test_auto_honours_a_named_drafter(drafter: str | None) -> None:
    coupled = {"acceptance": "coupled", "num_draft_tokens": "auto", "drafter": drafter}
    with driven(model("gpt2"), max_batch_size=3, corpus=corpus(), **coupled) as engine:
        outputs = [handle.result(0) for handle in traffic(engine, CALLS, do_sample=True)]
        counts = engine.engine.stats().speculation.drafters
    per_step = {"acceptance": "coupled", "num_draft_tokens": 0, "do_sample": True}
    assert [o.tokens for o in outputs] == [
        alone(p, model(), **c, **per_step) for p, c in zip(PROMPTS, CALLS, strict=False)
    ]
    assert set(counts) <= ({"expert", "lookup", "tree"} if drafter is None else {drafter})
    assert counts or drafter == "lookup"


# The assistant.


def every_draft_survives(engine: Driven, least: int = 60) -> None:
    counts = engine.engine.stats().speculation.drafters["assistant"]
    assert counts.num_draft_tokens == counts.num_accepted_tokens > least


def assert_it_holds_its_rows(engine: Driven, reader: Any) -> None:
    """Keys of every row in the assistant's cache are those that another copy of it makes of the row's text."""
    runner, rows = engine.scheduler.runners.assistant, engine.scheduler.runners.assistant_rows
    assert runner is not None and rows
    for slot, row in enumerate(rows):
        text = [*row.prompts["base"], *row.tokens][: runner.cache.host_lengths[slot]]
        made = reader(torch.tensor([text]), use_cache=True).past_key_values
        for own, expected in zip(runner.cache.layers, made.layers, strict=True):
            torch.testing.assert_close(own.keys[slot, :, : len(text)], expected.keys[0])


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
def test_the_assistants_cache_follows_the_rows(arguments: dict[str, Any]) -> None:
    with driven(equal_models(), max_batch_size=3, prefill_chunk=7, drafter="assistant") as engine:
        traffic(engine, CALLS, **arguments)
        every_draft_survives(engine)


def test_an_assistant_that_follows_the_wrong_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ways to lose a row: its prompt is not adopted whole, its place is not kept, a leaver's is taken for it."""

    def shortened(state: Any, runners: Any, row: Any, slot: int) -> None:
        adopt(state, runners, row, slot)
        cache = runners.assistant.cache
        cache.clear(len(state))  # its length stays

    adopt = assistant_module.adopt_row
    monkeypatch.setattr("specproxy.engine.prompts.adopt_row", shortened)
    with driven(equal_models(), max_batch_size=3, prefill_chunk=7, drafter="assistant") as engine:
        traffic(engine, CALLS)
        with pytest.raises(AssertionError):
            every_draft_survives(engine)
    monkeypatch.undo()

    def unmoved(state: Any, runners: Any) -> None:
        runners.assistant_rows = list(state.rows)
        runners.assistant.cache.set_lengths(0, [assistant_module._length(row) - 1 for row in state.rows])

    monkeypatch.setattr(assistant_module, "find_rows", unmoved)
    with driven(equal_models(), max_batch_size=3, prefill_chunk=7, drafter="assistant") as engine:
        traffic(engine, CALLS)
        with pytest.raises(AssertionError):
            every_draft_survives(engine)


def test_the_assistant_reads_prompts_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cycle waits for it: what a joining row brings has been read, beside the others' pieces."""
    pieces: list[int] = []
    windows: list[int] = []
    extend, forward = Runner.extend, Runner.forward

    def extended(runner: Runner, first: int, ids: list[list[int]], **keywords: Any) -> Any:
        pieces.extend(map(len, ids) if runner.role == "assistant" else ())
        return extend(runner, first, ids, **keywords)

    def forwarded(runner: Runner, tokens: torch.Tensor, **keywords: Any) -> Any:
        windows.extend([tokens.shape[1]] if runner.role == "assistant" else [])
        return forward(runner, tokens, **keywords)

    monkeypatch.setattr(Runner, "extend", extended)
    monkeypatch.setattr(Runner, "forward", forwarded)
    long = tiny.prompts([61], seed=9)[0]
    with driven(model(), prefill_chunk=5, drafter="assistant") as engine:
        first = engine.submit(PROMPTS[4], max_new_tokens=40)
        engine.turn()
        second = engine.submit(long, max_new_tokens=8)
        outputs = engine.finish(first, second)
    assert max(pieces) == 5 and sum(pieces) == len(PROMPTS[4]) - 1 + 60
    assert max(windows) == 2  # a last draft that was accepted, and the pending token
    assert [o.tokens for o in outputs] == [
        alone(PROMPTS[4], model(), max_new_tokens=40),
        alone(long, model(), max_new_tokens=8),
    ]


def test_the_assistant_reads_no_prompt_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of prompts that begin alike are copied in its cache too, from rows in flight and from ended ones;
    where logarithms of the prompt are asked for, every model reads all of it."""
    read: list[int] = []
    extend = Runner.extend

    def extended(runner: Runner, first: int, ids: list[list[int]], **keywords: Any) -> Any:
        read.extend(map(len, ids) if runner.role == "assistant" else ())
        return extend(runner, first, ids, **keywords)

    def follow(further: list[int]) -> None:
        read.clear()
        handle = engine.submit([*long, *further], max_new_tokens=9)
        while handle.output is None:
            engine.turn()
            assert_it_holds_its_rows(engine, reader)
        assert handle.output.tokens == alone([*long, *further], equal_models(), max_new_tokens=9)
        assert sum(read) <= min(len(further), 3)

    monkeypatch.setattr(Runner, "extend", extended)
    long, other, reader = PROMPTS[6], PROMPTS[1], copy.deepcopy(equal_models().assistant)
    with driven(equal_models(), max_batch_size=3, drafter="assistant") as engine:
        ended, running = engine.submit(other, max_new_tokens=4), engine.submit(long, max_new_tokens=30)
        engine.turn()
        assert sum(read) == len(other) + len(long) - 2
        assert ended.output is not None and running.output is None  # the long one's row has moved, in its own models
        follow([7, 8, 9])
        assert running.output is None
        follow([7, 8, 5, 6])  # of which the one before has read two tokens more
        engine.finish(running)
        follow([*running.result(0).tokens, 9])  # a whole text, whose last token the assistant has not read
        read.clear()
        (output,) = engine.finish(engine.submit([*other, 7], max_new_tokens=9, prompt_logprobs=1))
        assert sum(read) == len(other) and output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(other) + 1
        every_draft_survives(engine, least=40)
        engine.assert_empty()


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("broken")], ids=["memory", "other"])
def test_a_fault_while_the_assistant_drafts(error: Exception) -> None:
    """Out of memory gives up the last row; the rows that go on are read anew, whatever the fault has left of them."""

    def faulty(tokens: torch.Tensor, **keywords: Any) -> Any:
        for slot in range(4):
            runner.cache.clear(slot)
        raise error

    with driven(equal_models(), max_batch_size=3, drafter="assistant") as engine:
        handles = [engine.submit(prompt, max_new_tokens=30) for prompt in PROMPTS[:3]]
        engine.turn(2)
        runner = engine.scheduler.runners.assistant
        assert runner is not None
        runner.forward = faulty  # type: ignore[method-assign]
        engine.turn()
        del runner.forward
        later = engine.submit(PROMPTS[3], max_new_tokens=20)
        outputs = engine.finish(*handles, later)
        every_draft_survives(engine, least=30)
        engine.assert_empty()
    lost = [2] if isinstance(error, MemoryError) else [0, 1, 2]
    assert [i for i, output in enumerate(outputs) if output.finish_reason == "error"] == lost
    for i, (prompt, count) in enumerate(zip(PROMPTS[:4], (30, 30, 30, 20), strict=True)):
        if i not in lost:
            assert outputs[i].tokens == alone(prompt, equal_models(), max_new_tokens=count)


# Trees.


def test_trees_and_the_neighbour_that_forbids_them() -> None:
    """A request that samples under `rejection` gets chains, and its own tokens; greedy ones keep theirs beside it."""
    options = {"num_tree_tokens": 12, "num_draft_tokens": 3}
    sampled = {"max_new_tokens": 10, "seed": 4, **SAMPLED}
    with driven(model(), max_batch_size=3, prefill_chunk=7, **options) as engine:
        first = engine.submit(PROMPTS[0], max_new_tokens=40)
        engine.turn(2)
        assert set(engine.engine.stats().speculation.drafters) == {"tree"}
        second = engine.submit(PROMPTS[1], **sampled)
        engine.turn(6)
        assert set(engine.engine.stats().speculation.drafters) == {"tree", "expert"}
        outputs = engine.finish(first, second)
        engine.assert_empty()
    assert outputs[0].tokens == alone(PROMPTS[0], model(), max_new_tokens=40)
    assert outputs[1].tokens == alone(PROMPTS[1], model(), num_draft_tokens=3, **sampled)


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_trees_change_no_token(rule: str) -> None:
    arguments = SAMPLED if rule == "coupled" else {}
    shared = {"acceptance": rule, "num_tree_tokens": 12, "num_draft_tokens": 3}
    calls = [call | {"num_draft_tokens": number % 4} for number, call in enumerate(CALLS)]  # each of its own depth
    with driven(model(), max_batch_size=3, prefill_chunk=7, **shared) as engine:
        outputs = [handle.result(0) for handle in traffic(engine, calls, **arguments)]
        counts = engine.engine.stats().speculation.drafters
        engine.assert_empty()
    per_step = {"acceptance": rule, "num_draft_tokens": 0, **arguments}
    assert [o.tokens for o in outputs] == [
        alone(p, model(), **c | per_step) for p, c in zip(PROMPTS, CALLS, strict=False)
    ]
    assert set(counts) == {"tree"} and counts["tree"].num_accepted_tokens > 0
    for output, call in zip(outputs, calls, strict=True):
        drafted = output.statistics.drafted_per_position
        assert len(drafted) == min(call["num_draft_tokens"], 3), "a tree reached past a request's own limit"


def test_blocks_tell_the_refused_branch_of_a_tree() -> None:
    """What the expert's greedy chain goes on with behind the accepted path, up to a leaf: read off plain forwards."""
    proxy, prompt = model(), PROMPTS[3]
    options = {"num_tree_tokens": 14, "num_draft_tokens": 3}
    with driven(proxy, **options) as engine:
        handle = engine.submit(prompt, max_new_tokens=60)
        engine.finish(handle)
    text, lengths, at_leaves = list(prompt), set(), 0
    for block in handle:
        accepted = block.sources.count("draft")
        text += block.tokens[:accepted]
        chain = list(text)
        for _ in range(3):
            with torch.no_grad():
                chain.append(int(proxy.expert(torch.tensor([chain])).logits[0, -1].argmax()))
        assert list(block.refused) == chain[len(text) : len(text) + len(block.refused)]
        if accepted == len(block.tokens):
            assert block.refused == ()
        else:
            text.append(block.tokens[-1])
            assert block.tokens[-1] not in block.refused[:1] and len(block.refused) + accepted <= block.num_draft_tokens
            at_leaves += not block.refused
            lengths.add(len(block.refused))
            if accepted == 0 and block.num_draft_tokens:
                assert block.refused, "every tree has guesses at its root"
    assert text == [*prompt, *alone(prompt, model(), max_new_tokens=60)]
    assert len(lengths - {0}) > 1 and at_leaves


# What is refused.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"drafter": "nobody"}, "drafter='nobody' is not known"),
        ({"drafter": "lookup", "num_tree_tokens": 4}, "trees are the expert's"),
        ({"num_tree_tokens": 64}, "num_tree_tokens=64 must be at most 63"),
        ({"num_tree_tokens": 4, "num_draft_tokens": "auto"}, "needs num_draft_tokens as the tree's depth"),
        ({"drafter": "assistant"}, "needs an assistant; construct the model with assistant="),
        ({"corpus": [1, 2]}, "corpus is a list; give a LookupCorpus"),
    ],
)
def test_bad_engines_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Engine(ProxyTunedModel(*tiny.shared_trio("llama").models), **options)


def test_an_assistant_with_few_positions_or_ids() -> None:
    trio = tiny.shared_trio("llama")
    short = ProxyTunedModel(*trio.models, assistant=tiny.tiny_model("gpt2", n_positions=16))
    assert Engine(short).max_model_len == 128 and Engine(short, drafter="assistant").max_model_len == 16
    with pytest.raises(ConfigurationError, match="max_model_len=20 exceeds the 16 positions"):
        Engine(short, drafter="assistant", max_model_len=20)
    wide = tiny.make_trio("llama", vocab_sizes=(48, 48, 48))
    proxy = ProxyTunedModel(*wide.models, tokenizer=tiny.tiny_tokenizer(), assistant=tiny.tiny_model("gpt2"))
    with pytest.raises(PromptError, match="id 45, outside the assistant's vocabulary of 40"):
        Engine(proxy, drafter="assistant").submit([3, 45])


@pytest.mark.parametrize("name", ["drafter", "num_tree_tokens", "corpus"])
def test_a_request_does_not_choose_who_drafts(name: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"{name}=.* is not an argument of a request: it belongs to the engine"
    ):
        Engine(model()).submit([3, 4], **{name: "lookup"})


def test_the_models_own_corpus_is_the_engines() -> None:
    proxy = ProxyTunedModel(*tiny.shared_trio("llama").models)
    with driven(proxy, drafter="lookup") as engine:
        engine.finish(engine.submit(PROMPTS[3], max_new_tokens=16))
        without = engine.engine.stats().speculation.num_accepted_tokens
    proxy.corpus = corpus()
    with driven(proxy, drafter="lookup") as engine:
        (output,) = engine.finish(engine.submit(PROMPTS[3], max_new_tokens=16))
        assert engine.engine.stats().speculation.num_accepted_tokens > without
    assert output.tokens == alone(PROMPTS[3], model(), max_new_tokens=16)
