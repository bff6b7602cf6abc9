"""The life of requests: waiting, cancelled, late, read slowly or not at all; and the end of the engine."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import engines
import pytest
import tiny
import torch
from engines import PROMPTS, alone, driven
from hypothesis import given, settings
from hypothesis import strategies as st

from specproxy.engine import Engine, RequestHandle, scheduler
from specproxy.errors import EngineClosed, EngineFull


@pytest.mark.parametrize("stage", ["waiting", "reading", "admitted", "decoding", "last", "ended"])
def test_a_cancelled_request_leaves_at_the_next_turn(stage: str) -> None:
    with driven(max_batch_size=2, prefill_chunk=8, num_draft_tokens=0) as engine:
        other = engine.submit(PROMPTS[0], max_new_tokens=30)
        engine.turn()
        if stage == "waiting":
            second = engine.submit(PROMPTS[4], max_new_tokens=30)
            engine.turn()
        handle = engine.submit(PROMPTS[1], max_new_tokens=4)  # 29 tokens are read in four turns
        engine.turn({"waiting": 2, "reading": 3, "admitted": 4, "decoding": 5, "last": 6, "ended": 9}[stage])
        reached = engine.scheduler.running.get(1)
        assert (reached is not None) == (stage in ("waiting", "admitted", "decoding", "last"))
        assert (engine.scheduler.reading is not None) == (stage == "reading")
        handle.cancel()
        assert (handle.output is not None) == (stage == "ended")
        engine.turn()
        assert handle.output is not None
        assert handle.output.finish_reason == ("length" if stage == "ended" else "cancelled")
        count = {"admitted": 1, "decoding": 2, "last": 3, "ended": 4}.get(stage, 0)
        assert handle.output.tokens == alone(PROMPTS[1], max_new_tokens=4)[:count]
        assert [token for block in handle for token in block.tokens] == handle.output.tokens
        assert engine.scheduler.reading is None and len(engine.scheduler.running) == 1 + (stage == "waiting")
        outputs = engine.finish(other, *([second] if stage == "waiting" else []))
        engine.assert_empty()
    expected = [alone(p, max_new_tokens=30) for p in (PROMPTS[0], PROMPTS[4])]
    assert [output.tokens for output in outputs] == expected[: len(outputs)]


def test_deadlines_reach_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven(max_batch_size=1, prefill_chunk=8) as engine:
        decoding = engine.submit(PROMPTS[0], max_new_tokens=100, deadline=50.0)
        engine.turn(2)
        waiting = engine.submit(PROMPTS[0], max_new_tokens=10, deadline=10.0)
        patient = engine.submit(PROMPTS[1], max_new_tokens=10, deadline=100.0)
        lasting = engine.submit(PROMPTS[2], max_new_tokens=10)
        start = decoding.timings.submitted
        for now, ended in ((9.0, 0), (11.0, 1), (49.0, 1), (51.0, 2)):
            monkeypatch.setattr(scheduler, "monotonic", lambda now=now: start + now)
            engine.turn()
            assert sum(h.output is not None for h in (decoding, waiting, patient, lasting)) == ended
        assert decoding.result(0).finish_reason == waiting.result(0).finish_reason == "deadline"
        assert decoding.result(0).tokens and waiting.result(0).tokens == []
        assert engine.scheduler.reading is not None  # the patient one's prompt
        monkeypatch.setattr(scheduler, "monotonic", lambda: start + 101)
        engine.turn()
        assert patient.result(0).finish_reason == "deadline"
        (output,) = engine.finish(lasting)
        engine.assert_empty()
        assert engine.engine.stats().finished == {"deadline": 3, "length": 1}
    assert output.tokens == alone(PROMPTS[2], max_new_tokens=10)


def test_a_full_queue_pushes_back() -> None:
    with driven(max_batch_size=1, max_queue=2) as engine:
        handles = [engine.submit(PROMPTS[0], max_new_tokens=5)]
        engine.turn()
        handles += [engine.submit(PROMPTS[0], max_new_tokens=5) for _ in range(2)]
        with pytest.raises(EngineFull, match="2 requests wait, as many as max_queue=2 allows"):
            engine.submit(PROMPTS[0])
        handles[1].cancel()
        engine.turn()
        handles.append(engine.submit(PROMPTS[0], max_new_tokens=5))
        outputs = engine.finish(*handles)
    assert [output.finish_reason for output in outputs] == ["length", "cancelled", "length", "length"]


def test_a_reader_that_never_reads_holds_nobody_up() -> None:
    """Its tokens are kept, no more than it asked for, and its row goes to the next one."""
    with Engine(engines.model(), max_batch_size=2) as engine:
        lazy = [engine.submit(PROMPTS[0], max_new_tokens=30) for _ in range(2)]
        others = [engine.submit(PROMPTS[1], max_new_tokens=20) for _ in range(3)]
        assert [h.result(60).tokens for h in others] == [alone(PROMPTS[1], max_new_tokens=20)] * 3
        assert all(sum(len(b.tokens) for b in handle._blocks) == 30 for handle in lazy)
        assert engine.stats().running == 0 and engine.stats().free_rows == 2
    assert [t for block in lazy[0] for t in block.tokens] == lazy[0].result(0).tokens


def test_a_blocked_reader_and_the_cycles_beside_it() -> None:
    blocked, go = threading.Event(), threading.Event()
    read: list[int] = []

    def slow(handle: RequestHandle) -> None:
        for block in handle:
            blocked.set()
            go.wait(60)
            read.extend(block.tokens)

    with Engine(engines.model()) as engine:
        handle = engine.submit(PROMPTS[0], max_new_tokens=30)
        reader = threading.Thread(target=slow, args=(handle,))
        reader.start()
        assert blocked.wait(60)
        before = engine.stats().cycles
        assert engine.submit(PROMPTS[1], max_new_tokens=30).result(60).finish_reason == "length"
        assert engine.stats().cycles > before and not go.is_set()
        go.set()
        reader.join()
    assert read == alone(PROMPTS[0], max_new_tokens=30)


def test_a_client_that_vanishes_frees_its_row() -> None:
    with driven() as engine:
        with pytest.raises(ZeroDivisionError), engine.submit(PROMPTS[0], max_new_tokens=60) as handle:
            engine.turn(2)
            raise ZeroDivisionError
        engine.turn()
        engine.assert_empty()
        with engine.submit(PROMPTS[0], max_new_tokens=6) as complete:
            engine.finish()
    assert (handle.result(0).finish_reason, complete.result(0).finish_reason) == ("cancelled", "length")


def test_event_loops_read_and_wait() -> None:
    async def read(engine: Engine, prompt: list[int], count: int) -> list[int]:
        handle = engine.submit(prompt, max_new_tokens=count)
        tokens = [token async for block in handle for token in block.tokens]
        assert (await handle.wait()).tokens == tokens
        return tokens

    async def leave(engine: Engine) -> str:
        with engine.submit(PROMPTS[1], max_new_tokens=90) as handle:
            await anext(handle)
        return (await handle.wait()).finish_reason

    async def run(engine: Engine) -> list[Any]:
        return await asyncio.gather(*(read(engine, p, 8 + i) for i, p in enumerate(PROMPTS[:4])), leave(engine))

    with Engine(engines.model(), max_batch_size=3) as engine:
        *texts, reason = asyncio.run(run(engine))
        closed = engine.submit(PROMPTS[0], max_new_tokens=90)

        async def abandon() -> None:
            asyncio.ensure_future(closed.wait())  # noqa: RUF006  # its loop ends before it does
            await asyncio.sleep(0)

        asyncio.run(abandon())
        assert closed.result(60).finish_reason == "length"
    assert texts == [alone(p, max_new_tokens=8 + i) for i, p in enumerate(PROMPTS[:4])]
    assert reason == "cancelled"


def test_results_are_waited_for_no_longer_than_asked() -> None:
    with driven() as engine:
        handle = engine.submit(PROMPTS[0], max_new_tokens=5, request_id="slow")
        with pytest.raises(TimeoutError, match="request slow has not ended within 0 seconds"):
            handle.result(0)


def test_draining_finishes_what_runs_and_what_waits() -> None:
    engine = Engine(engines.model(), max_batch_size=1)
    assert engine.drain(0)  # nothing was ever there
    engine = Engine(engines.model(), max_batch_size=1)
    handles = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[:3]]
    assert engine.drain(60)
    assert engine.health.state == "draining"
    with pytest.raises(EngineClosed, match="the engine is draining and takes no more requests"):
        engine.submit(PROMPTS[0])
    assert [h.result(0).tokens for h in handles] == [alone(p, max_new_tokens=12) for p in PROMPTS[:3]]
    engine.close()
    engine.close()
    assert engine.health.state == "closed"


def test_closing_cancels_and_gives_the_models_back() -> None:
    trio = tiny.shared_trio("llama")
    before = trio.base.config._attn_implementation
    engine = Engine(engines.model(), max_batch_size=1)
    handles = [engine.submit(prompt, max_new_tokens=80) for prompt in PROMPTS[:3]]
    next(handles[0])
    assert trio.base.config._attn_implementation != before
    engine.close()
    assert {handle.result(0).finish_reason for handle in handles} == {"cancelled"}
    assert trio.base.config._attn_implementation == before
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.submit(PROMPTS[0])


def test_an_engine_that_nobody_holds_ends_its_thread() -> None:
    engine = Engine(engines.model())
    handle = engine.submit(PROMPTS[0], max_new_tokens=5)
    handle.result(60)
    thread, gone = engine._shared.thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and thread is not None
    thread.join(60)
    assert not thread.is_alive()


def test_leaving_the_engine_by_an_error_cancels() -> None:
    with pytest.raises(ZeroDivisionError), Engine(engines.model()) as engine:
        handle = engine.submit(PROMPTS[0], max_new_tokens=100)
        next(handle)
        raise ZeroDivisionError
    assert handle.result(0).finish_reason == "cancelled"


# Prefixes.


def test_a_prompt_that_begins_like_another_is_copied() -> None:
    """From a row that has ended, from one in flight, and from a whole conversation; the texts stay what they were."""
    shared = tiny.prompts([24], seed=5)[0]
    first, second = [*shared, 7, 8], [*shared, 9, 3, 11]
    with driven(prefill_chunk=16) as engine:
        (ended,) = engine.finish(engine.submit(first, max_new_tokens=30))
        copied = engine.submit(second, max_new_tokens=10)
        further = [*first, *ended.tokens, 4, 5]
        turn = engine.submit(further, max_new_tokens=10)
        outputs = engine.finish(copied, turn)
        stats = engine.engine.stats()
        engine.assert_empty()
    assert ended.num_reused_tokens == 0
    assert [output.num_reused_tokens for output in outputs] == [24, len(first) + 29]  # all but the last token's
    assert [output.tokens for output in outputs] == [alone(p, max_new_tokens=10) for p in (second, further)]
    assert stats.reused_tokens == 24 + len(first) + 29
    with driven(prefill_chunk=100) as engine:
        running = [engine.submit(p, max_new_tokens=10) for p in (first, second, first)]
        outputs = engine.finish(*running)
    assert [output.num_reused_tokens for output in outputs] == [0, 24, 25]
    assert [output.tokens for output in outputs] == [alone(p, max_new_tokens=10) for p in (first, second, first)]


def test_every_role_is_matched_by_its_own_prompt() -> None:
    plain, chat = tiny.prompts([20, 26], seed=6)
    roles = {"expert": chat}
    with driven() as engine:
        engine.finish(engine.submit(plain, max_new_tokens=5, role_prompts=roles))
        other = {"expert": [*chat[:12], 3, 4, 5]}
        (output,) = engine.finish(engine.submit([*plain, 6], max_new_tokens=12, role_prompts=other))
    assert output.num_reused_tokens == 20
    assert output.tokens == alone([*plain, 6], max_new_tokens=12, role_prompts=other)


def test_kept_prefixes_are_bounded_and_the_oldest_go() -> None:
    prompts = tiny.prompts([20] * 4, seed=8)
    with driven(prefix_cache=50) as engine:
        for prompt in prompts[:2]:
            engine.finish(engine.submit(prompt, max_new_tokens=3))
        (again,) = engine.finish(engine.submit(prompts[0], max_new_tokens=3))
        engine.finish(engine.submit(prompts[2], max_new_tokens=3))  # the second has not been used for longest
        reused = [
            output.num_reused_tokens
            for output in engine.finish(*(engine.submit(p, max_new_tokens=1) for p in (prompts[0], prompts[1])))
        ]
        assert engine.engine.stats().kept_positions <= 50 and engine.engine.stats().kept_prefixes == 2
    assert again.num_reused_tokens == 19 and reused == [19, 0]
    with driven(prefix_cache=0) as engine:
        outputs = [engine.finish(engine.submit(prompts[0], max_new_tokens=3))[0] for _ in range(2)]
        assert engine.engine.stats().kept_prefixes == 0
    assert [output.num_reused_tokens for output in outputs] == [0, 0]


# Anything, in any order.

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 7), st.integers(0, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("turn"), st.integers(1, 3), st.just(0)),
    ),
    min_size=4,
    max_size=24,
)


@given(operations=OPERATIONS, rows=st.integers(1, 3), chunk=st.sampled_from([3, 50]), cache=st.sampled_from([0, 60]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_whatever_happens_texts_are_right_and_nothing_is_left(
    operations: list[tuple[str, int, int]], rows: int, chunk: int, cache: int
) -> None:
    with driven(max_batch_size=rows, prefill_chunk=chunk, prefix_cache=cache, max_queue=4) as engine:
        handles: list[tuple[int, RequestHandle]] = []
        for name, number, budget in operations:
            if name == "submit" and len(engine.scheduler.queue) < 4:
                handles.append((number, engine.submit(PROMPTS[number], max_new_tokens=budget)))
            elif name == "cancel" and handles:
                handles[number % len(handles)][1].cancel()
            elif name == "turn":
                engine.turn(number)
        engine.finish()
        engine.assert_empty()
        assert sum(engine.engine.stats().finished.values()) == len(handles)
    for number, handle in handles:
        output = handle.result(0)
        tokens = [token for block in handle for token in block.tokens]
        assert tokens == output.tokens == _greedy(number)[: len(tokens)]
        assert output.finish_reason in ("cancelled", "length")
        assert torch.tensor(output.statistics.drafted_per_position).sum() == output.statistics.num_draft_tokens


_texts: dict[int, list[int]] = {}


def _greedy(number: int) -> list[int]:
    """A prefix property of greedy decoding: a longer text begins with the shorter one."""
    if number not in _texts:
        _texts[number] = alone(PROMPTS[number], max_new_tokens=12)
    return _texts[number]
