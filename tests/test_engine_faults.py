"""What goes wrong with one request, one cycle or the loop itself, and who has to bear it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import engines
import pytest
import tiny
import torch
from engines import PROMPTS, Driven, alone, driven, once

from specproxy.engine import Engine
from specproxy.errors import EngineClosed
from specproxy.model import ProxyTunedModel

POISON = tiny.VOCAB_SIZE - 1  # a token whose embedding is made NaN; nothing else may hold it
MEMORY = torch.OutOfMemoryError("no memory is left")
POISONED = [5, POISON, 7, 8]


@pytest.fixture(params=["base", "expert", "anti_expert"])
def poisoned(request: pytest.FixtureRequest) -> Iterator[tuple[ProxyTunedModel, str]]:
    """A trio in which one model turns a certain token into NaN."""
    trio = tiny.make_trio("llama")
    with torch.no_grad():
        getattr(trio, request.param).get_input_embeddings().weight[POISON] = torch.nan
    yield ProxyTunedModel(*trio.models), request.param


def neighbours(engine: Driven, count: int = 2, budget: int = 25) -> list[Any]:
    return [engine.submit(prompt, max_new_tokens=budget, suppress_tokens=[POISON]) for prompt in PROMPTS[:count]]


def expected(count: int = 2, budget: int = 25) -> list[list[int]]:
    return [alone(prompt, max_new_tokens=budget, suppress_tokens=[POISON]) for prompt in PROMPTS[:count]]


def test_nan_ends_its_own_request_and_leaves_no_trace(poisoned: tuple[ProxyTunedModel, str]) -> None:
    """The row that follows in the same slot is shorter than its neighbours: it reads, masked, what was there before."""
    proxy, role = poisoned
    with driven(proxy, max_batch_size=3, prefill_chunk=64) as engine:
        handles = neighbours(engine)
        bad = engine.submit(POISONED * 5, max_new_tokens=9)
        engine.turn(2)
        assert bad.output is not None and bad.output.finish_reason == "error"
        assert role in str(bad.output.error) and "NaN" in str(bad.output.error) and bad.output.tokens == []
        late = engine.submit(PROMPTS[0], max_new_tokens=12, suppress_tokens=[POISON])
        *outputs, last = engine.finish(*handles, late)
        engine.assert_empty()
        assert engine.engine.stats().finished == {"error": 1, "length": 3}
        assert engine.engine.health.state == "ready"
    assert [output.tokens for output in outputs] == expected()
    assert last.tokens == alone(PROMPTS[0], max_new_tokens=12, suppress_tokens=[POISON])


def test_nan_that_is_cancelled_in_time_leaves_no_trace(poisoned: tuple[ProxyTunedModel, str]) -> None:
    """Its keys and values were never found to be bad: they are cleared all the same."""
    proxy, _ = poisoned
    with driven(proxy, max_batch_size=3, prefill_chunk=64) as engine:
        handles = neighbours(engine)
        engine.turn()
        bad = engine.submit(POISONED * 5, max_new_tokens=9)
        engine.scheduler._read_prompts()  # admitted, and no cycle yet
        assert len(engine.scheduler.running) == 3
        bad.cancel()
        late = engine.submit(PROMPTS[0], max_new_tokens=12, suppress_tokens=[POISON])
        *outputs, last = engine.finish(*handles, late)
    assert bad.result(0).finish_reason == "cancelled"
    assert [output.tokens for output in outputs] == expected()
    assert last.tokens == alone(PROMPTS[0], max_new_tokens=12, suppress_tokens=[POISON])


def test_nan_in_a_scored_prompt(poisoned: tuple[ProxyTunedModel, str]) -> None:
    with driven(poisoned[0]) as engine:
        handles = neighbours(engine, 1)
        bad = engine.submit(POISONED, max_new_tokens=3, prompt_logprobs=0)
        output, failed = engine.finish(*handles, bad)
    assert failed.finish_reason == "error" and "over the prompt are not usable" in str(failed.error)
    assert [output.tokens] == expected(1)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
def test_what_a_callers_function_raises_ends_its_own_request(name: str) -> None:
    text = alone(PROMPTS[2], max_new_tokens=20)

    def fails(*arguments: Any) -> Any:
        prefix = arguments[1] if name == "prefix_allowed_tokens_fn" else arguments[0]
        if prefix.shape[-1] == len(PROMPTS[2]) + 6:
            raise KeyError("what the caller did not foresee")
        if name == "prefix_allowed_tokens_fn":
            return list(range(tiny.VOCAB_SIZE))
        return arguments[1] if name == "logits_processor" else False

    with driven() as engine:
        handles = [engine.submit(p, max_new_tokens=25) for p in PROMPTS[:2]]
        function = fails if name == "prefix_allowed_tokens_fn" else [fails]
        # Removing NaN must not turn a failed law into one that can be drawn from.
        options = {"remove_invalid_values": True} if name == "prefix_allowed_tokens_fn" else {}
        bad = engine.submit(PROMPTS[2], max_new_tokens=20, **{name: function}, **options)
        *outputs, failed = engine.finish(*handles, bad)
        engine.assert_empty()
    assert failed.finish_reason == "error" and "KeyError: 'what the caller did not foresee'" in str(failed.error)
    assert failed.tokens == text[:6]
    assert [output.tokens for output in outputs] == [alone(p, max_new_tokens=25) for p in PROMPTS[:2]]


def test_what_only_a_refused_draft_leads_to_never_happened() -> None:
    prompt = PROMPTS[2]
    text = [*prompt, *alone(prompt, max_new_tokens=20)]
    strayed = []

    def fails_astray(prefix: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if prefix[0].tolist() != text[: prefix.shape[1]]:
            strayed.append(prefix.shape[1])
            raise RuntimeError("never on this path")
        return scores

    with driven() as engine:
        (output,) = engine.finish(engine.submit(prompt, max_new_tokens=20, logits_processor=[fails_astray]))
    assert output.tokens == text[len(prompt) :] and output.finish_reason == "length"
    assert strayed


def test_memory_that_runs_out_over_a_prompt() -> None:
    with driven(prefill_chunk=8) as engine:
        handles = [engine.submit(PROMPTS[0], max_new_tokens=25)]
        engine.turn()
        runner = engine.scheduler.runners.expert
        runner.extend = once(runner.extend, MEMORY, call=2)  # type: ignore[method-assign]
        bad = engine.submit(PROMPTS[6], max_new_tokens=4)
        again = engine.submit(PROMPTS[6], max_new_tokens=4)
        output, failed, good = engine.finish(*handles, bad, again)
        engine.assert_empty()
    assert failed.finish_reason == "error" and "its prompt could not be read: OutOfMemoryError" in str(failed.error)
    assert output.tokens == alone(PROMPTS[0], max_new_tokens=25)
    assert good.tokens == alone(PROMPTS[6], max_new_tokens=4)


@pytest.mark.parametrize("place", ["expert", "anti_expert", "read"])
def test_memory_that_runs_out_during_a_cycle_costs_the_row_that_came_last(place: str) -> None:
    """At "read" the device has committed the cycle already, and is put back to what the host knows."""
    sampling = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2, "max_new_tokens": 25}
    with driven() as engine:
        handles = [engine.submit(prompt, seed=i, **sampling) for i, prompt in enumerate(PROMPTS[:3])]
        engine.turn(2)
        runners = engine.scheduler.runners
        owner, name = (runners, "read") if place == "read" else (runners.by_role[place], "forward")
        setattr(owner, name, once(getattr(owner, name), MEMORY))
        engine.turn()
        assert [handle.output is None for handle in handles] == [True, True, False]
        *outputs, failed = engine.finish(*handles)
        engine.assert_empty()
        assert engine.engine.stats().failed_turns == 1 and engine.engine.health.state == "ready"
    assert failed.finish_reason == "error" and "memory ran out during a cycle" in str(failed.error)
    assert [o.tokens for o in outputs] == [alone(p, seed=i, **sampling) for i, p in enumerate(PROMPTS[:2])]


def test_memory_that_runs_out_while_a_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers are longer then than others; growing goes on where it broke off."""
    with driven(max_model_len=128) as engine:
        handles = [engine.submit(PROMPTS[0], max_new_tokens=100), engine.submit(PROMPTS[1], max_new_tokens=60)]
        for runner in engine.scheduler.runners:
            runner.cache.capacity = 40  # as if the first capacity had been small
            runner.cache.layers.clear()
        engine.turn(2)
        pad = once(torch.nn.functional.pad, MEMORY, call=2)
        monkeypatch.setattr(torch.nn.functional, "pad", pad)
        output, failed = engine.finish(*handles)
    assert failed.finish_reason == "error" and "memory ran out" in str(failed.error)
    assert output.tokens == alone(PROMPTS[0], max_new_tokens=100)


def test_memory_that_never_comes_back_ends_every_request_and_not_the_engine() -> None:
    with driven(max_batch_size=3) as engine:
        handles = [engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS[:5]]
        runner = engine.scheduler.runners.base
        forward = runner.forward
        runner.forward = once(forward, MEMORY, times=10**6)  # type: ignore[method-assign]
        assert {output.finish_reason for output in engine.finish(*handles)} == {"error"}
        runner.forward = forward  # type: ignore[method-assign]
        (output,) = engine.finish(engine.submit(PROMPTS[0], max_new_tokens=9))
    assert output.tokens == alone(PROMPTS[0], max_new_tokens=9)


def test_any_other_fault_of_a_cycle_ends_its_rows_alone() -> None:
    with driven(max_batch_size=2) as engine:
        handles = [engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS[:4]]
        runner = engine.scheduler.runners.by_role["anti_expert"]
        runner.forward = once(runner.forward, RuntimeError("a kernel is missing"))  # type: ignore[method-assign]
        outputs = engine.finish(*handles)
        engine.assert_empty()
    assert [output.finish_reason for output in outputs] == ["error", "error", "length", "length"]
    assert "a cycle has failed: RuntimeError: a kernel is missing" in str(outputs[0].error)
    assert [o.tokens for o in outputs[2:]] == [alone(p, max_new_tokens=9) for p in PROMPTS[2:4]]


@pytest.mark.parametrize("part", ["follow", "move"])
def test_a_fault_while_a_cycle_is_settled_ends_every_row(part: str) -> None:
    """The host has taken some of the cycle in: no row can be trusted, not even where memory was the cause."""
    with driven(max_batch_size=3) as engine:
        handles = [engine.submit(prompt, max_new_tokens=6 + i) for i, prompt in enumerate(PROMPTS[:4])]
        engine.turn()
        cache = engine.scheduler.runners.by_role["anti_expert"].cache
        setattr(cache, part, once(getattr(cache, part), MEMORY))
        outputs = engine.finish(*handles)
        engine.assert_empty()
    assert [output.finish_reason for output in outputs[:3]] == ["error"] * 3
    assert outputs[3].tokens == alone(PROMPTS[3], max_new_tokens=9)


def test_the_loop_gives_up_after_repeated_faults_and_tells_everybody() -> None:
    engine = Engine(engines.model(), max_batch_size=1)
    go = threading.Event()

    def wait(prefix: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        go.wait(60)
        return scores

    first = engine.submit(PROMPTS[0], max_new_tokens=50, logits_processor=[wait])
    handles = [first, *(engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS[:6])]
    while engine._shared.scheduler is None:
        pass
    runner = engine._shared.scheduler.runners.expert
    runner.forward = once(runner.forward, RuntimeError("the device is gone"), times=10**6)  # type: ignore[method-assign]
    go.set()
    outputs = [handle.result(60) for handle in handles]
    assert {output.finish_reason for output in outputs} == {"error"}
    assert all("the device is gone" in str(output.error) for output in outputs)
    assert "the engine's loop has ended" in str(outputs[-1].error)
    engine._shared.thread.join()  # type: ignore[union-attr]
    assert engine.health.state == "dead" and "the device is gone" in str(engine.health.reason)
    with pytest.raises(EngineClosed, match="the engine is dead"):
        engine.submit(PROMPTS[0])
    assert engine.drain(1)
    engine.close()
    assert alone(PROMPTS[0], max_new_tokens=5)  # the models are the caller's again


def test_whoever_collects_a_closed_engine_does_not_wait_for_its_thread() -> None:
    held = [Engine(engines.model())]
    held[0]._shared.thread = threading.main_thread()  # one that does not end
    held[0].close()
    worker = threading.Thread(target=held.clear, daemon=True)
    worker.start()
    worker.join(20)
    assert not worker.is_alive()
