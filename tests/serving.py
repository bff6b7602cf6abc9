"""What the server's tests share: a tiny trio that writes letters, clients in this process, a server in a thread."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import tiny
import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from test_hf_generation import letters

from specproxy import Engine, ProxyTunedModel
from specproxy.server import ServerSettings, create_app

MODEL = "tiny"
PROMPT = "the rain in"


@functools.cache
def model() -> ProxyTunedModel:
    """In float64, so that speculation changes no greedy token."""
    return ProxyTunedModel(*tiny.shared_trio("llama").models, tokenizer=letters())


@functools.cache
def reference() -> ProxyTunedModel:
    """The same models again, for what is expected: those of an engine are its own while it runs."""
    return ProxyTunedModel(*tiny.make_trio("llama").models, tokenizer=letters())


def ids_of(prompt: str = PROMPT) -> list[int]:
    """Token ids of a prompt."""
    return list(letters()(prompt).input_ids)


@functools.cache
def expected_tokens(prompt: str = PROMPT, count: int = 24, **arguments: Any) -> list[int]:
    """New tokens of per-step decoding, alone; greedy unless told otherwise."""
    ids = torch.tensor([ids_of(prompt)])
    found = reference().generate(ids, max_new_tokens=count, num_draft_tokens=0, **{"top_k": 0, **arguments})
    return found[0, ids.shape[1] :].tolist()


def text_of(tokens: list[int]) -> str:
    """Their text without special tokens."""
    return letters().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def application(settings: dict[str, Any] | None = None, **engine_arguments: Any) -> Iterator[FastAPI]:
    """An application over an engine of its own, which ends with it; the engine stands in `app.state.engine`."""
    engine = Engine(model(), **{"max_batch_size": 4, **engine_arguments})
    try:
        app = create_app(engine, ServerSettings(**{"model_names": (MODEL,), **(settings or {})}))
        app.state.engine = engine
        yield app
    finally:
        engine.close()


def call(app: FastAPI, path: str, body: Any = None, *, raw: bytes | None = None, **keywords: Any) -> httpx.Response:
    """One request to an application in this process: POST where there is a body."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            if body is None and raw is None:
                return await client.get(path, **keywords)
            return await client.post(path, json=body, content=raw, **keywords)

    return asyncio.run(run())


def complete(app: FastAPI, prompt: Any = PROMPT, **fields: Any) -> Any:
    """The answer to a greedy completion that must succeed."""
    body = {"prompt": prompt, "temperature": 0, **fields}
    response = call(app, "/v1/completions", body)
    assert response.status_code == 200, response.text
    return events(response.text) if fields.get("stream") else response.json()


def events(text: str) -> list[Any]:
    """What a stream of events holds; it must end as OpenAI's do."""
    parts = text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]"
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """An application behind a real socket, in a thread; gives its address."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a reader who does not read is noticed
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def num_ended(app: FastAPI) -> float:
    """Answers that are over for the server too: told to their client, or left by it."""
    return counted(call(app, "/metrics").text, "request_success_total")


def counted(metrics: str, name: str) -> float:
    """A counter of `/metrics`, over all of its labels."""
    samples = (sample for family in text_string_to_metric_families(metrics) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == f"specproxy:{name}")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is so."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
