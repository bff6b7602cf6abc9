"""Answers that parse: JSON schemas, regular expressions and choices through the server, on the embedded trio."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import openai
import pytest
import serving
from fastapi import FastAPI

from specproxy import ConfigurationError, Engine, ProxyTunedModel
from specproxy.server import ServerSettings, create_app
from specproxy.server.grammars import Grammars
from specproxy.server.wire import CompletionRequest
from specproxy.structured import GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99999},
        "sure": {"type": "boolean"},
        "unit": {"enum": ["none", "metre"]},
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
    },
    "required": ["sum", "sure", "unit", "steps"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
MESSAGES: Any = [{"role": "user", "content": "What is 347 + 68?"}]


@pytest.fixture(scope="module")
def app() -> Any:
    with Engine(ProxyTunedModel.demo(), max_batch_size=4) as engine:
        yield create_app(engine, ServerSettings(model_names=("demo",)))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Any:
    with (
        serving.listening(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def check(text: str) -> None:
    """The answer holds to `SCHEMA`."""
    answer = json.loads(text)
    assert list(answer) == ["sum", "sure", "unit", "steps"]
    assert type(answer["sum"]) is int and 0 <= answer["sum"] <= 99999 and type(answer["sure"]) is bool
    assert answer["unit"] in ("none", "metre") and 1 <= len(answer["steps"]) <= 2
    assert all(isinstance(step, str) and len(step) <= 6 for step in answer["steps"])


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    settings = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 300, "response_format": FORM}
    return client.chat.completions.create(**{**settings, **fields})


def test_answers_hold_to_a_schema(client: openai.OpenAI) -> None:
    """Greedy and drawn, several at once; each ends where its grammar does."""
    greedy = [chat(client, temperature=0, extra_body={"num_draft_tokens": count}).choices[0] for count in (0, 4)]
    assert greedy[0].message.content == greedy[1].message.content
    drawn = chat(client, temperature=1.5, seed=3, n=3, extra_body={"return_speculation": True}).choices
    for choice in (*greedy, *drawn):
        check(choice.message.content)
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in drawn}) == 3
    # The expert drafts under the same grammar, so that drafts survive.
    assert sum(choice.speculation["num_accepted_tokens"] for choice in drawn) > 0


def test_streams_hold_to_a_schema(client: openai.OpenAI) -> None:
    chunks = list(chat(client, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check(text)
    assert text == chat(client, temperature=0).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_other_forms(client: openai.OpenAI) -> None:
    settings: Any = {"model": "demo", "prompt": "Question: What is 3 + 4?\nAnswer:", "max_tokens": 64, "temperature": 1}

    def complete(**structure: Any) -> str:
        body = {"structured_outputs": structure}
        choice = client.completions.create(**settings, seed=1, extra_body=body).choices[0]
        assert choice.finish_reason == "stop"
        return choice.text

    assert re.fullmatch(r"\d{2,3}-[xyz]+\.", complete(regex=r"\d{2,3}-[xyz]{1,4}\."))
    choices = ["(yes)", "no, never", "a+b|c", "é?"]
    assert complete(choice=choices) in choices
    assert complete(json={"const": [1, None]}).replace(" ", "").replace("\n", "") == "[1,null]"
    text = client.completions.create(**settings, seed=1, extra_body={"response_format": {"type": "json_object"}})
    assert text.choices[0].text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema goes with", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "schema is missing",
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "horse"}}}},
            "horse",
            "response_format",
        ),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "uniqueItems", "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "unclosed group", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "give one of", "structured_outputs"),
        ({"structured_outputs": {"choice": ["b"]}, "min_tokens": 3}, "min_tokens", None),
        ({"structured_outputs": {"choice": ["b"]}, "response_format": {"type": "json_object"}}, "both given", None),
    ],
)
def test_bad_structures_are_400(app: FastAPI, fields: dict[str, Any], message: str, param: str | None) -> None:
    response = serving.call(app, "/v1/chat/completions", {"messages": MESSAGES, **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert message in error["message"] and error["param"] == param


def test_grammars_are_compiled_once_and_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ProxyTunedModel.demo().tokenizer
    grammars = Grammars(tokenizer, [0])
    request = CompletionRequest(prompt="a", structured_outputs={"json": SCHEMA})
    loop_went_on = threading.Event()
    compile_schema = GrammarCompiler.json_schema

    def slowly(self: GrammarCompiler, schema: Any) -> Any:
        assert loop_went_on.wait(60), "nothing else ran on the event loop"
        return compile_schema(self, schema)

    monkeypatch.setattr(GrammarCompiler, "json_schema", slowly)

    async def both() -> Any:
        first = asyncio.ensure_future(grammars.of(request))
        await asyncio.sleep(0)
        loop_went_on.set()
        return await first, await grammars.of(request), await grammars.of(CompletionRequest(prompt="a"))

    first, second, free = asyncio.run(both())
    assert first is second and first is not None and free is None


def test_a_compiler_refuses_what_it_cannot_use() -> None:
    tokenizer = ProxyTunedModel.demo().tokenizer
    with pytest.raises(ConfigurationError, match="needs an end token"):
        GrammarCompiler(tokenizer, [])
    with pytest.raises(ConfigurationError, match="fast tokenizer"):
        GrammarCompiler(object(), [0])
    compiler = GrammarCompiler(tokenizer, [0])
    for schema in ([], "text"):
        with pytest.raises(ConfigurationError, match="no object"):
            compiler.json_schema(schema)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="choices"):
        compiler.choice([])


def test_a_walk_answers_by_its_arguments_alone() -> None:
    """Forwards, back and sideways, as drafts come and go."""
    tokenizer = ProxyTunedModel.demo().tokenizer
    grammar = GrammarCompiler(tokenizer, [0]).json_schema(SCHEMA)
    texts = ['{"sum": 12, "sure": true', '{"sum": 1', '{"sum": 7, "sure": false, "unit"', "{"]
    paths = [tokenizer(text).input_ids for text in texts]
    walk = grammar.walk()
    for path in (*paths, *reversed(paths), *paths):
        for length in (0, len(path) // 2, len(path), len(path) - 1):
            fresh = grammar.walk().mask(path[:length])
            assert walk.mask(path[:length]).equal(fresh), (path, length)
    with pytest.raises(RuntimeError, match="the grammar has failed"):
        grammar.walk().mask(tokenizer("[").input_ids)
