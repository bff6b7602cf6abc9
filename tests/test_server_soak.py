"""Many requests over real sockets: some leave at random moments, some are malformed, some meet NaN in one model.

Afterwards every row is free, nothing has grown, and every healthy text is the one that its request gets alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections import Counter
from typing import Any

import httpx
import psutil
import pytest
import torch
from serving import application, expected_tokens, listening, model, text_of, wait_for
from test_hf_generation import letters

PROMPTS = ["the", "rain in", "spain stays", "mainly on a plain", "one", "of those", "a", "in the rain", "stays", "so"]
POISON = letters().convert_tokens_to_ids("q")  # in no prompt above; kept out of every answer
CONCURRENCY = 32
LENGTH = 24
KINDS = {"cancelled": 0.20, "malformed": 0.05, "poisoned": 0.02}
MALFORMED: list[bytes] = [
    b"{",
    b'{"prompt": 3}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "nothing": 1}',
    json.dumps({"prompt": "a", "max_tokens": 10**6}).encode(),
]
HEADERS = {"content-type": "application/json"}


def kinds(count: int, draw: random.Random) -> list[str]:
    """The exact shares of every kind, in random order."""
    found = [kind for kind, share in KINDS.items() for _ in range(round(share * count))]
    found += ["healthy"] * (count - len(found))
    draw.shuffle(found)
    return found


class Soak:
    """One run: what is sent, what comes back.

    Args:
        address: of the server.
        seed: of all that is random.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.address, self.draw = address, random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.texts: list[tuple[str, int, str]] = []  # prompt, tokens, text
        self.retries = 0

    async def run(self, count: int) -> None:
        """Send so many requests, `CONCURRENCY` at a time."""
        waiting = kinds(count, self.draw)
        limits = httpx.Limits(max_connections=2 * CONCURRENCY)
        async with httpx.AsyncClient(base_url=self.address, timeout=120, limits=limits) as client:

            async def worker() -> None:
                while waiting:
                    await self._one(client, waiting.pop())

            await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

    async def _one(self, client: httpx.AsyncClient, kind: str) -> None:
        prompt = self.draw.choice(PROMPTS)
        count = self.draw.choice([4, 9, LENGTH])
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": count, "temperature": 0}
        body["logit_bias"] = {str(POISON): -100}
        body |= {"stream": self.draw.random() < 0.5, "num_draft_tokens": self.draw.choice([0, 2, 4])}
        if kind == "malformed":
            response = await self._post(client, content=self.draw.choice(MALFORMED), headers=HEADERS)
            self.outcomes[f"malformed {response.status_code}"] += 1
        elif kind == "poisoned":
            response = await self._post(client, json=body | {"prompt": f"{prompt} q", "stream": False})
            self.outcomes[f"poisoned {response.status_code}"] += 1
        elif kind == "cancelled":
            body |= {"max_tokens": 100, "num_draft_tokens": 0}
            request = asyncio.create_task(self._post(client, json=body))
            await asyncio.sleep(self.draw.random() * 0.3)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            self.outcomes["cancelled" if request.cancelled() else "too late to cancel"] += 1
        else:
            response = await self._post(client, json=body)
            self.outcomes[f"healthy {response.status_code}"] += 1
            if response.status_code == 200:
                self.texts.append((prompt, count, _text(response)))

    async def _post(self, client: httpx.AsyncClient, **request: Any) -> httpx.Response:
        """Post, again where the queue is full."""
        while True:
            response = await client.post("/v1/completions", **request)
            if response.status_code != 429:
                return response
            assert float(response.headers["retry-after"]) > 0
            self.retries += 1
            await asyncio.sleep(0.05)


def _text(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("application/json"):
        text: str = response.json()["choices"][0]["text"]
        return text
    parts = [json.loads(part[6:]) for part in response.text.split("\n\n") if part.startswith("data: {")]
    return "".join(part["choices"][0]["text"] for part in parts)


def soak(count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run it against a server of its own; returns its figures."""
    poisoned = model().base
    forward = poisoned.forward

    def spoiled(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        output.logits[keywords["input_ids"][:, -output.logits.shape[1] :] == POISON] = torch.nan
        return output

    monkeypatch.setattr(poisoned, "forward", spoiled)
    with application(max_batch_size=8, max_queue=24, prefix_cache=256) as app, listening(app) as address:
        engine = app.state.engine
        asyncio.run(Soak(address, seed=1).run(40))  # what is made once is made before memory is looked at
        gc.collect()
        memory = psutil.Process().memory_info().rss
        began = time.perf_counter()
        run = Soak(address, seed=2)
        asyncio.run(run.run(count))
        seconds = time.perf_counter() - began
        wait_for(lambda: engine.stats().running + engine.stats().waiting + engine.stats().reading == 0)
        gc.collect()
        stats = engine.stats()
        assert engine.health.state == "ready" and stats.free_rows == 8 and stats.failed_turns == 0
        assert httpx.get(f"{address}/health").status_code == 200
    alone = {prompt: expected_tokens(prompt, LENGTH, suppress_tokens=(POISON,)) for prompt, _, _ in run.texts}
    wrong = sum(text != text_of(alone[prompt][:size]) for prompt, size, text in run.texts)
    return {
        "requests": count,
        "outcomes": dict(sorted(run.outcomes.items())),
        "healthy texts": len(run.texts),
        "that differ from those alone": wrong,
        "429, tried again": run.retries,
        "memory grown by MiB": round((psutil.Process().memory_info().rss - memory) / 2**20, 1),
        "requests per second": round(count / seconds, 1),
        "engine": stats.finished,
    }


def check(figures: dict[str, Any]) -> None:
    """Hold the figures against what a run of that size must give."""
    count, outcomes = figures["requests"], figures["outcomes"]
    print("\n" + json.dumps(figures, indent=2))
    healthy = count - sum(round(share * count) for share in KINDS.values())
    assert outcomes["healthy 200"] == healthy == figures["healthy texts"]
    assert figures["that differ from those alone"] == 0
    assert outcomes["malformed 400"] == round(0.05 * count)
    assert outcomes["poisoned 500"] == round(0.02 * count)
    assert outcomes["cancelled"] > 0.1 * count
    assert figures["memory grown by MiB"] < 64


def test_soak(monkeypatch):
    check(soak(150, monkeypatch))


@pytest.mark.slow
def test_soak_of_2000_requests(monkeypatch):
    figures = soak(2000, monkeypatch)
    check(figures)
    assert figures["429, tried again"] > 0, "the queue was never full"
