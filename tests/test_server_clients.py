"""Unmodified clients over a real socket: openai (sync, async, streaming), curl; clients that leave or do not read."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from typing import Any

import openai
import pytest
from serving import MODEL, PROMPT, application, expected_tokens, ids_of, listening, model, num_ended, text_of, wait_for

TEXT = text_of(expected_tokens())
LONG = 110


@pytest.fixture(scope="module")
def app():
    with application(max_queue=16) as app:
        yield app


@pytest.fixture(scope="module")
def address(app):
    with listening(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


# openai.


def test_openai_completions(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, logprobs=1)
    assert answer.choices[0].text == TEXT and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 24 and answer.usage.prompt_tokens == len(ids_of())
    assert len(answer.choices[0].logprobs.token_logprobs) == 24
    several = client.completions.create(model=MODEL, prompt=[PROMPT, "one"], max_tokens=4, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_openai_chat(client):
    messages: Any = [{"role": "user", "content": PROMPT}]
    settings: Any = {"model": MODEL, "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    answer = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content == TEXT and answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    stopped = client.chat.completions.create(**settings, stop=[TEXT[5:8], TEXT[9:11]])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == TEXT[: min(TEXT.find(TEXT[5:8]), TEXT.find(TEXT[9:11]))]


def test_openai_streams(client):
    settings: Any = {"model": MODEL, "max_tokens": 24, "temperature": 0, "stream": True}
    with_usage = {"stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(prompt=PROMPT, **settings, **with_usage))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage.completion_tokens == 24 and 3 < len(chunks) < 24
    messages: Any = [{"role": "user", "content": PROMPT}]
    chunks = list(client.chat.completions.create(messages=messages, **settings))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "length"
    with client.chat.completions.stream(
        model=MODEL, messages=messages, max_tokens=24, temperature=0, stop=[TEXT[9:12]]
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT[: TEXT.find(TEXT[9:12])]


def test_openai_seeds_and_several_answers(client):
    def draw(**fields: Any) -> list[str]:
        settings: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 1.2, **fields}
        return [choice.text for choice in client.completions.create(**settings).choices]

    three = draw(n=3, seed=4)
    assert len(set(three)) == 3 and draw(n=3, seed=4) == three and draw(n=1, seed=4) == three[:1]
    assert draw(n=1, seed=5) != three[:1] and draw() != draw()


def test_openai_extras(client):
    extra = {"alpha": 0.0, "num_draft_tokens": 2, "return_speculation": True, "return_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=extra)
    choice: Any = answer.choices[0]
    assert choice.token_ids == expected_tokens(count=12, alpha=0.0)
    assert choice.speculation["num_new_tokens"] == 12 and len(choice.speculation["token_sources"]) == 12


def test_openai_errors(client, address):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="another", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    assert client.models.retrieve(MODEL).id == MODEL == client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"


def test_openai_async(address):
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            settings: Any = {"model": MODEL, "prompt": PROMPT, "temperature": 0}
            answers = await asyncio.gather(
                *(client.completions.create(**settings, max_tokens=count) for count in range(4, 16))
            )
            assert [answer.choices[0].text for answer in answers] == [
                text_of(expected_tokens(count=count)) for count in range(4, 16)
            ]
            stream = await client.completions.create(**settings, max_tokens=24, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT

    asyncio.run(run())


# curl.


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(address):
    def curl(*arguments: str) -> str:
        return subprocess.run(["curl", "-sS", "-N", *arguments], capture_output=True, text=True, check=True).stdout

    body = json.dumps({"prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    post = (f"{address}/v1/completions", "-H", "Content-Type: application/json", "-d")
    assert json.loads(curl(*post, body))["choices"][0]["text"] == TEXT
    streamed = curl(*post, body[:-1] + ', "stream": true}')
    assert streamed.endswith("data: [DONE]\n\n")
    assert json.loads(curl(f"{address}/health"))["status"] == "ok"
    assert "specproxy:num_requests_running" in curl(f"{address}/metrics")
    assert "Content-Type: application/json" in curl(f"{address}/v1/completions", "-d", body)


# Clients that leave, or do not read.


def connect(address: str, **fields: Any) -> socket.socket:
    """A socket on which a stream has been asked for."""
    host, port = address.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # before the connection is made
    client.connect((host, int(port)))
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    return client


@pytest.fixture
def slow_base(monkeypatch):
    """Cycles that take a while, so that a client can leave in the middle."""
    base = model().base
    forward = base.forward

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.02)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(base, "forward", slow)


@pytest.mark.parametrize("streams", [True, False])
def test_a_vanished_client_frees_its_row(app, address, client, slow_base, streams):
    engine = app.state.engine
    cancelled = engine.stats().finished.get("cancelled", 0)
    leaving = connect(address, stream=streams, num_draft_tokens=0)
    wait_for(lambda: engine.stats().running == 1)
    if streams:
        assert b"data: " in leaving.recv(4096) + leaving.recv(4096)
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stream=True)
    leaving.close()
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT, "others go on"
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().finished.get("cancelled", 0) == cancelled + 1
    assert engine.stats().free_rows == engine.max_batch_size


def test_a_client_that_leaves_several_answers(app, address, slow_base):
    engine = app.state.engine
    leaving = connect(address, n=3, temperature=1.0, num_draft_tokens=0)
    wait_for(lambda: engine.stats().running == 3)
    leaving.close()
    wait_for(lambda: engine.stats().running == 0)
    assert engine.stats().waiting == 0


def test_a_slow_reader_stalls_nobody(app, address, client):
    """Its socket is full and it does not read: cycles go on, others get their text, its own waits for it."""
    engine = app.state.engine
    before = num_ended(app)
    fields = {"logprobs": 20, "n": 4, "temperature": 1.0, "return_speculation": True, "ignore_eos": True}
    readers = [connect(address, **fields) for _ in range(2)]
    wait_for(lambda: engine.stats().running + engine.stats().waiting > 0)
    cycles = engine.stats().cycles
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == TEXT
    wait_for(lambda: engine.stats().running + engine.stats().waiting + engine.stats().reading == 0)
    assert engine.stats().cycles > cycles, "the loop waits for no reader"
    assert num_ended(app) == before + 1, "the readers did not block, so that nothing was shown"
    for reader in readers:  # nothing of its text is lost
        reader.settimeout(60)
        text = b""
        while b"data: [DONE]\n\n" not in text:
            text += reader.recv(2**20)
        assert text.count(b'"finish_reason":"length"') == 4
        reader.close()
    wait_for(lambda: num_ended(app) == before + 1 + 8)
