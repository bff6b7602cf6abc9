"""Load on the engine for a while: many clients, some leave, some ask for nonsense, some meet NaN. Nothing may leak.

Every healthy text has to be the one that its request gets alone, token for token, in float64.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
import pytest
import torch

from specproxy.demo import example_prompts
from specproxy.engine import Engine, RequestHandle
from specproxy.errors import ConfigurationError, EngineFull, PromptError
from specproxy.model import ProxyTunedModel

CONCURRENCY = 32
LONGEST = 40
QUESTIONS = [
    "Question: Tom has {a} apples and buys {b} more. How many apples does Tom have?\nAnswer:",
    "Question: Ben has {a} coins and loses {b}. How many coins does Ben have?\nAnswer:",
    "Question: What is {a} + {b}?\nAnswer:",
]


@contextmanager
def poisoned(model: ProxyTunedModel, role: str, token: int) -> Iterator[None]:
    """One model turns a token into NaN, in every row that holds it and in no other."""

    def poison(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None].to(output.device), torch.nan)

    hook = getattr(model, role).get_input_embeddings().register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_mebibytes() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


class Load:
    """Clients of one engine.

    Args:
        model: the embedded trio, in float64.
        engine: over it.
        poison: the token that one of its models turns into NaN.
    """

    def __init__(self, model: ProxyTunedModel, engine: Engine, poison: int) -> None:
        self.model, self.engine, self.poison = model, engine, poison
        texts = [example_prompts("arithmetic")[0], *(q.format(a=a, b=9 + a) for q in QUESTIONS for a in (12, 47, 83))]
        self.prompts: list[list[int]] = [model.tokenizer(text).input_ids for text in texts]
        self.texts: dict[int, list[int]] = {}  # by the number of the prompt, LONGEST tokens or to its end
        self.seen: Counter[str] = Counter()
        self.latencies: list[float] = []

    def expected(self, number: int, budget: int) -> list[int]:
        if number not in self.texts:
            self.texts[number] = engines.alone(
                self.prompts[number], self.model, max_new_tokens=LONGEST, suppress_tokens=[self.poison]
            )
        return self.texts[number][:budget]

    async def client(self, requests: list[random.Random]) -> None:
        while requests:
            await self.one(requests.pop())

    async def one(self, chance: random.Random) -> None:
        kind = chance.choices(["healthy", "cancelled", "malformed", "poisoned"], [73, 20, 5, 2])[0]
        number, budget = chance.randrange(len(self.prompts)), chance.randint(1, LONGEST)
        prompt = self.prompts[number]
        if kind == "malformed":
            bad: list[dict[str, Any]] = [
                {"prompt": []},
                {"prompt": [10**6]},
                {"prompt": prompt, "max_new_tokens": 10**6},
                {"prompt": prompt, "do_sample": True, "temperature": -1.0},
                {"prompt": prompt, "colour": "red"},
            ]
            with pytest.raises((ConfigurationError, PromptError)):
                await self.submit(**chance.choice(bad))
            self.seen[kind] += 1
            return
        arguments: dict[str, Any] = {"max_new_tokens": budget, "suppress_tokens": [self.poison]}
        if chance.random() < 0.2:
            arguments["num_draft_tokens"] = chance.choice([0, 1, 7])
        if chance.random() < 0.1:
            arguments["logprobs"] = 2
        handle = await self.submit([*prompt, self.poison] if kind == "poisoned" else prompt, **arguments)
        if kind == "cancelled":
            await self.leave(handle, chance)
        elif chance.random() < 0.7:
            read = [token async for block in handle for token in block.tokens]
            assert read == handle.result(0).tokens
        output = await handle.wait()
        self.seen[f"{kind}: {output.finish_reason}"] += 1
        if kind == "poisoned":
            assert output.finish_reason == "error" and "NaN" in str(output.error) and output.tokens == []
            return
        expected = self.expected(number, budget)
        assert output.tokens == expected[: len(output.tokens)]
        if kind == "healthy":
            assert output.finish_reason in ("stop", "length") and output.tokens == expected
            total = output.timings.total_seconds
            assert total is not None
            self.latencies.append(total)

    async def submit(self, prompt: list[int], **arguments: Any) -> RequestHandle:
        while True:
            try:
                return self.engine.submit(prompt, **arguments)
            except EngineFull:
                self.seen["pushed back"] += 1
                await asyncio.sleep(0.05)

    async def leave(self, handle: RequestHandle, chance: random.Random) -> None:
        """Give a request up before, while or after it decodes."""
        wait = chance.randint(0, 6)
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.2)
        else:
            async for _ in handle:
                wait -= 1
                if wait < 0:
                    break
        handle.cancel()


def soak(count: int, role: str, seed: int, **options: Any) -> None:
    """Put `count` requests through an engine, NaN coming from one role; prints what happened."""
    model = ProxyTunedModel.demo(dtype=torch.float64)
    if options.get("drafter") == "assistant":
        helper = ProxyTunedModel.demo("python", dtype=torch.float64).expert
        trio = (model.base, model.expert, model.anti_expert, model.tokenizer, model.alpha)
        model = ProxyTunedModel(*trio, assistant=helper)
    poison = model.vocab_size - 1
    before = live_tensors()
    began, used = time.perf_counter(), resident_mebibytes()
    with poisoned(model, role, poison):
        engine = Engine(model, max_batch_size=16, max_queue=12, prefill_chunk=24, prefix_cache=512, **options)
        load = Load(model, engine, poison)
        requests = [random.Random(f"{seed} {i}") for i in range(count)]

        async def run() -> None:
            await asyncio.gather(*(load.client(requests) for _ in range(CONCURRENCY)))

        asyncio.run(run())
        assert engine.drain(60) and engine.health.state == "draining"
        stats, scheduler = engine.stats(), engine._shared.scheduler
        assert scheduler is not None
        engines.assert_empty(scheduler)
        assert (stats.running, stats.reading, stats.waiting, stats.free_rows, stats.kv_usage) == (0, 0, 0, 16, 0.0)
        assert stats.kept_positions <= 512 and stats.failed_turns == 0
        engine.close()
    del engine, scheduler, load.engine
    assert live_tensors() == before  # models alone are left
    seconds = time.perf_counter() - began
    submitted = count - load.seen["malformed"]
    assert sum(stats.finished.values()) == submitted
    assert stats.finished["error"] == load.seen["poisoned: error"]
    print(
        f"\n{count} requests, {CONCURRENCY} clients, {options}, NaN from the {role}: "
        f"{dict(sorted(load.seen.items()))}\n"
        f"{stats.speculation.num_new_tokens} tokens in {seconds:.1f} s and {stats.cycles} cycles, acceptance "
        f"{stats.speculation.acceptance_rate:.3f}, {stats.reused_tokens} of {stats.prompt_tokens} prompt tokens "
        f"reused, median latency {sorted(load.latencies)[len(load.latencies) // 2]:.2f} s, "
        f"memory {used:.0f} MiB before and {resident_mebibytes():.0f} MiB after"
    )
    assert {"malformed", "poisoned: error", "cancelled: cancelled", "healthy: length"} <= set(load.seen)


def test_soak_short() -> None:
    soak(70, "base", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["base", "expert", "anti_expert"])
def test_soak_2000_requests(role: str) -> None:
    soak(2000, role, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"drafter": "lookup", "num_draft_tokens": 8},
        {"drafter": "cascade"},
        {"drafter": "assistant"},
        {"num_tree_tokens": 16},
        {"num_draft_tokens": "auto", "drafter": "assistant"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_soak_of_drafters(options: dict[str, Any]) -> None:
    soak(300, "base", seed=3, **options)
