"""The server's wire, in this process: forms of answers, streams, limits, failures, figures."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    MODEL,
    PROMPT,
    application,
    call,
    complete,
    events,
    expected_tokens,
    ids_of,
    model,
    reference,
    text_of,
    wait_for,
)
from test_hf_generation import letters

from specproxy.server.logs import _JsonFormatter
from specproxy.server.service import choice_seed

GREEDY = expected_tokens
OTHER = "one of those"


@pytest.fixture(scope="module")
def app():
    with application() as app:
        yield app


def chat(app: Any, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **fields}
    response = call(app, "/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return events(response.text) if fields.get("stream") else response.json()


# Answers.


def test_a_completion_is_the_models_own(app):
    answer = complete(app, max_tokens=24)
    assert answer["choices"][0] == {
        "index": 0,
        "text": text_of(GREEDY()),
        "finish_reason": "length",
        "stop_reason": None,
        "logprobs": None,
    }
    assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
    usage, length = answer["usage"], len(ids_of())
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (length, 24, length + 24)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_draft_length_changes_no_greedy_token(app, count):
    assert complete(app, max_tokens=24, num_draft_tokens=count)["choices"][0]["text"] == text_of(GREEDY())


def test_every_form_of_prompt(app):
    texts = [text_of(GREEDY(prompt, 8)) for prompt in (PROMPT, OTHER)]
    for prompts in ([PROMPT, OTHER], [ids_of(PROMPT), ids_of(OTHER)]):
        answer = complete(app, prompts, max_tokens=8)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert answer["usage"]["prompt_tokens"] == len(ids_of(PROMPT)) + len(ids_of(OTHER))
    assert complete(app, ids_of(), max_tokens=8)["choices"][0]["text"] == texts[0]
    assert len(complete(app)["choices"][0]["text"]) == len(text_of(GREEDY(count=16))), "16 tokens are the default"


def test_alpha_of_a_request(app):
    tokens = expected_tokens(count=12, alpha=0.0)
    assert tokens != GREEDY(count=12)
    assert complete(app, max_tokens=12, alpha=0)["choices"][0]["text"] == text_of(tokens)


def test_a_chat_reads_its_template(app):
    """Without a template of the tokenizer every role reads the contents, a blank line between them."""
    assert chat(app, max_tokens=9)["choices"][0]["message"] == {
        "role": "assistant",
        "content": text_of(GREEDY(count=9)),
        "refusal": None,
    }
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:]}]
    answer = chat(app, messages=[{"role": "user", "content": parts}], max_completion_tokens=9)
    assert answer["choices"][0]["message"]["content"] == text_of(GREEDY(count=9))


def test_roles_read_templates_of_their_own():
    raw = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own = "{% for m in messages %}so {{ m.content }}{% endfor %}"
    settings = {"base_template": raw, "expert_template": own, "anti_expert_template": own}
    ids, others = torch.tensor([ids_of()]), torch.tensor([ids_of(f"so {PROMPT}")])
    for templates, arguments in (
        (settings, {"expert_input_ids": others, "anti_expert_input_ids": others}),
        (settings | {"anti_expert_template": None}, {"expert_input_ids": others}),
    ):
        expected = reference().generate(ids, max_new_tokens=12, num_draft_tokens=0, **arguments)[0, ids.shape[1] :]
        with application(templates) as app:
            assert chat(app, max_tokens=12)["choices"][0]["message"]["content"] == text_of(expected.tolist())


def test_sampling_is_that_of_generate_with_its_seed(app):
    settings = {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.3}
    ids = torch.tensor([ids_of()])
    expected = reference().generate(
        ids,
        max_new_tokens=12,
        do_sample=True,
        seed=[choice_seed(11, 1)],
        sequence_bias={(7,): 3.0},
        **settings,
        **penalties,
    )
    fields = {**settings, **penalties, "logit_bias": {"7": 3}, "seed": 11, "n": 2, "max_tokens": 12}
    answer = complete(app, **fields)
    first, second = (choice["text"] for choice in answer["choices"])
    assert second == text_of(expected[0, ids.shape[1] :].tolist())
    assert first != second
    assert complete(app, **{**fields, "n": 1})["choices"][0]["text"] == first, (
        "the first answer's seed is the request's"
    )
    assert answer["usage"]["prompt_tokens"] == len(ids_of()), "a prompt counts once"


def test_by_default_nothing_is_filtered(app):
    ids = torch.tensor([ids_of()])
    expected = reference().generate(ids, max_new_tokens=12, do_sample=True, top_k=0, seed=[5])
    answer = call(app, "/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "seed": 5}).json()
    assert answer["choices"][0]["text"] == text_of(expected[0, ids.shape[1] :].tolist())


# Ends.


def stop_inside_a_block(app: Any) -> tuple[str, str, int]:
    """A stop string that ends with a token behind which the same cycle accepted another one: it, text, tokens."""
    chunks = complete(app, stream=True, max_tokens=24, return_token_ids=True, num_draft_tokens=4)
    sizes = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks if "token_ids" in chunk["choices"][0]]
    start = 0
    for size in sizes:
        if size > 2 and start > 2:
            tokens = GREEDY()[: start + size - 2]
            stop = text_of(tokens)[-3:]
            if text_of(tokens).find(stop) == len(text_of(tokens)) - 3:
                return stop, text_of(tokens)[:-3], len(tokens)
        start += size
    raise AssertionError("no block is long enough: choose another prompt")


def test_a_stop_string_cuts_inside_a_block(app):
    stop, text, count = stop_inside_a_block(app)
    for streams in (False, True):
        fields = {"stop": ["never there", stop], "max_tokens": 24, "num_draft_tokens": 4, "logprobs": 0}
        answer = complete(
            app, stream=streams, **fields, **({"stream_options": {"include_usage": True}} if streams else {})
        )
        chunks = answer if streams else [answer]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert "".join(choice["text"] for choice in choices) == text
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
        assert chunks[-1]["usage"]["completion_tokens"] == count, "what lies behind the cut is not counted"
        shown = [choice["logprobs"]["tokens"] for choice in choices if choice["logprobs"]]
        assert sum(map(len, shown)) == count
    assert app.state.engine.stats().running == 0


def test_a_stop_string_is_shown_where_asked_for(app):
    stop, text, _ = stop_inside_a_block(app)
    answer = complete(app, stop=stop, max_tokens=24, include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == text + stop


def test_stop_tokens_and_least_lengths(app):
    tokens = GREEDY()
    at = next(t for t in range(4, 24) if tokens[t] not in tokens[:t])
    answer = complete(app, stop_token_ids=[tokens[at]], max_tokens=24)
    assert answer["choices"][0]["text"] == text_of(tokens[:at])
    assert answer["choices"][0]["stop_reason"] == tokens[at]
    assert answer["usage"]["completion_tokens"] == at + 1
    longer = complete(app, stop_token_ids=[tokens[at]], min_tokens=at + 3, max_tokens=24)
    assert longer["usage"]["completion_tokens"] >= at + 3
    text = text_of(tokens)
    late = complete(app, stop=[text[0]], min_tokens=6, max_tokens=24)
    start = len(text_of(tokens[:6]))
    assert late["choices"][0]["text"] == (text[: text.find(text[0], start)] if text[0] in text[start:] else text)


def test_ends_of_the_models_are_ignored_on_demand():
    proxy, end = model(), GREEDY()[5]
    proxy.base.generation_config.eos_token_id = end
    try:
        with application() as app:
            assert complete(app, max_tokens=24)["usage"]["completion_tokens"] == GREEDY().index(end) + 1
            assert complete(app, max_tokens=24, ignore_eos=True)["usage"]["completion_tokens"] == 24
    finally:
        proxy.base.generation_config.eos_token_id = None


# Logarithms.


def law_of(prompt: str, count: int) -> torch.Tensor:
    """Log-probabilities of every position of a prompt and its greedy continuation, by one plain forward."""
    ids = torch.tensor([ids_of(prompt) + GREEDY(prompt, count)])
    return reference().forward(ids).logits[0].detach().log_softmax(-1)


def test_logprobs_of_a_completion_with_its_prompt(app):
    prompt, count = ids_of(), 6
    law, tokens = law_of(PROMPT, count), ids_of() + GREEDY(count=count)
    choice = complete(app, echo=True, logprobs=3, max_tokens=count)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == PROMPT + text_of(GREEDY(count=count))
    assert len(found["tokens"]) == len(tokens) and found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for t in range(1, len(tokens)):
        assert found["token_logprobs"][t] == pytest.approx(float(law[t - 1, tokens[t]]), abs=1e-9)
        best = law[t - 1].topk(3)
        named = found["top_logprobs"][t]
        assert sorted(named.values(), reverse=True)[:3] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert found["tokens"][t] in named and len(named) <= 4
        if t >= len(prompt):
            assert found["token_logprobs"][t] == max(named.values()), "greedy"
    for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)


@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_scored_alone(app, most):
    """What loglikelihood tasks ask: one new token or none."""
    tokens, law = ids_of(), law_of(PROMPT, 1)
    answer = complete(app, [tokens], echo=True, logprobs=1, max_tokens=most)
    scores = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == len(tokens) + most
    expected = [float(law[t - 1, tokens[t]]) for t in range(1, len(tokens))]
    assert scores[1 : len(tokens)] == pytest.approx(expected, abs=1e-9)
    assert answer["usage"]["completion_tokens"] == most


def test_logprobs_of_a_chat(app):
    content = chat(app, logprobs=True, top_logprobs=2, max_tokens=5)["choices"][0]["logprobs"]["content"]
    law = law_of(PROMPT, 5)[len(ids_of()) - 1 :]
    for t, (entry, token) in enumerate(zip(content, GREEDY(count=5), strict=True)):
        assert entry["logprob"] == pytest.approx(float(law[t, token]), abs=1e-9)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(law[t].topk(2).values.tolist())
    assert "".join(entry["token"] for entry in content) == letters().decode(GREEDY(count=5))


def test_prompt_logprobs_by_id(app):
    tokens, law = ids_of(), law_of(PROMPT, 1)
    found = complete(app, prompt_logprobs=1, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == len(tokens)
    for t in range(1, len(tokens)):
        entry = found[t][str(tokens[t])]
        assert entry["logprob"] == pytest.approx(float(law[t - 1, tokens[t]]), abs=1e-9)
        assert entry["rank"] == int((law[t - 1] > law[t - 1, tokens[t]]).sum()) + 1


# Streams.


def test_a_chat_streams_as_openais_does(app):
    chunks = chat(app, stream=True, max_tokens=12, n=2, seed=1, stream_options={"include_usage": True}, logprobs=True)
    *body, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in body)
    assert len({chunk["id"] for chunk in chunks}) == 1 and {c["object"] for c in chunks} == {"chat.completion.chunk"}
    whole = chat(app, max_tokens=12, n=2, seed=1)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in body if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == whole["choices"][index]["message"]["content"]
        assert sum(len(choice["logprobs"]["content"]) for choice in own if choice["logprobs"]) == 12


def test_one_chunk_a_cycle_with_figures_on_demand(app):
    before = app.state.engine.stats().cycles
    chunks = complete(
        app,
        stream=True,
        max_tokens=24,
        return_token_ids=True,
        return_speculation=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    opening, *body, end, usage = chunks
    assert opening["choices"][0]["prompt_token_ids"] == ids_of()
    assert len(body) == app.state.engine.stats().cycles - before < 24
    tokens, texts, sources = [], [], []
    for chunk in body:
        choice = chunk["choices"][0]
        tokens += choice["token_ids"]
        texts += choice["speculation"]["token_texts"]
        sources += choice["speculation"]["token_sources"]
        assert choice["text"] == "".join(choice["speculation"]["token_texts"])
        assert chunk["usage"]["completion_tokens"] == len(tokens)
    assert tokens == GREEDY() and "".join(texts) == text_of(GREEDY())
    figures = end["choices"][0]["speculation"]
    assert sources.count("draft") == figures["num_accepted_tokens"] > 0
    assert figures["num_new_tokens"] == 24 and figures["num_cycles"] == len(body)
    assert 0 < figures["seconds"]["first_token"] <= figures["seconds"]["total"]
    assert usage["usage"]["total_tokens"] == len(ids_of()) + 24


def test_echo_streams_the_prompt_first(app):
    chunks = complete(app, stream=True, echo=True, max_tokens=4)
    assert chunks[0]["choices"][0]["text"] == PROMPT
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT + text_of(GREEDY(count=4))
    assert all("usage" not in chunk for chunk in chunks)


# What else there is.


def test_models_tokens_version_and_health(app):
    entry = call(app, "/v1/models").json()["data"][0]
    assert (entry["id"], entry["object"], entry["max_model_len"]) == (MODEL, "model", app.state.engine.max_model_len)
    assert call(app, f"/v1/models/{MODEL}").json() == entry
    assert call(app, "/health").json()["status"] == "ok"
    assert call(app, "/version").json()["version"]
    found = call(app, "/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert found["tokens"] == ids_of() and found["count"] == len(ids_of()) and "".join(found["token_strs"]) == PROMPT
    assert call(app, "/tokenize", {"messages": [{"role": "user", "content": PROMPT}]}).json()["tokens"] == ids_of()
    assert call(app, "/detokenize", {"tokens": ids_of()}).json() == {"prompt": PROMPT}


def test_request_ids_come_back(app):
    given = call(app, "/health", headers={"x-request-id": "mine-7"})
    assert given.headers["x-request-id"] == "mine-7"
    made = call(app, "/health", headers={"x-request-id": "not one\there"}).headers["x-request-id"]
    assert made.isalnum()


def test_metrics_count_what_happened():
    with application() as app:
        complete(app, max_tokens=24)
        complete(app, max_tokens=8, n=2)
        families = {f.name: f for f in text_string_to_metric_families(call(app, "/metrics").text)}
        stats = app.state.engine.stats().speculation

        def value(name: str, suffix: str = "_total", **labels: str) -> float:
            samples = families[f"specproxy:{name}"].samples
            return sum(
                s.value for s in samples if s.name == f"specproxy:{name}{suffix}" and labels.items() <= s.labels.items()
            )

        assert value("generation_tokens") == 40 == stats.num_new_tokens
        assert value("prompt_tokens") == 3 * len(ids_of())
        assert value("spec_decode_num_draft_tokens") == stats.num_draft_tokens > 0
        assert value("spec_decode_num_accepted_tokens") == stats.num_accepted_tokens > 0
        assert value("spec_decode_num_drafts") == stats.drafted_per_position[0]
        for position, accepted in enumerate(stats.accepted_per_position):
            assert value("spec_decode_num_accepted_tokens_per_pos", position=str(position)) == accepted
        assert value("request_success", finished_reason="length") == 3
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
            assert value(name, "_count") == 3
        assert value("inter_token_latency_seconds", "_count") > 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert value(name, "") == 0


# Failures.

BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ""}, None),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [10**9]}, None),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": -2}, "top_k"),
    ({"prompt": "a", "min_p": 2}, "min_p"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**6}, None),
    ({"prompt": "a" * 3000}, None),
    ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, None),
    ({"prompt": "a", "presence_penalty": 2.1}, "presence_penalty"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"40": 1}}, None),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "alpha": 1e308}, "alpha"),
    ({"prompt": "a", "num_draft_tokens": 64}, "num_draft_tokens"),
    ({"prompt": "a", "best_of": 3}, None),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, None),
    ({"prompt": "a", "stream": True, "echo": True, "logprobs": 1}, None),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, None),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_input_is_answered_with_400(app, body, param):
    response = call(app, "/v1/completions", raw=json.dumps(body).encode(), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert len(error["message"]) > 10


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_request(app, raw):
    response = call(app, "/v1/completions", raw=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},  # this tokenizer has no end token
        {"top_logprobs": 2},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_chats_that_cannot_be_had(app, fields):
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    response = call(app, "/v1/chat/completions", body)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_there(app):
    other = call(app, "/v1/completions", {"prompt": "a", "model": "other"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert call(app, "/v1/models/other").status_code == 404
    assert call(app, "/nowhere").status_code == 404 and "error" in call(app, "/nowhere").json()
    assert call(app, "/v1/completions").status_code == 405


def test_a_key_is_asked_for():
    with application({"api_key": "secret"}) as app:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            response = call(app, "/v1/models", headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert call(app, "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert [call(app, path).status_code for path in ("/health", "/metrics", "/version")] == [200] * 3


def test_bodies_are_bounded():
    def pieces():
        for _ in range(20):
            yield b" " * 100

    async def streamed():
        for piece in pieces():
            yield piece

    with application({"max_body_bytes": 1000}) as app:
        for raw in (b" " * 1001, streamed()):
            response = call(app, "/v1/completions", raw=raw, headers={"content-type": "application/json"})
            assert response.status_code == 413 and "1000 bytes" in response.json()["error"]["message"]


def test_limits_of_the_operator():
    with application({"max_tokens": 5, "max_choices": 2}) as app:
        for fields in ({"max_tokens": 6}, {"n": 3}):
            assert call(app, "/v1/completions", {"prompt": "a", **fields}).status_code == 400
        assert complete(app)["usage"]["completion_tokens"] == 5
        assert chat(app)["usage"]["completion_tokens"] == 5


def test_a_full_queue_is_answered_with_429():
    with application(max_batch_size=1, max_queue=2) as app:
        engine = app.state.engine
        held, go_on = threading.Event(), threading.Event()

        def hold(prefix: torch.Tensor, scores: Any) -> bool:
            held.set()
            return not go_on.wait(60)

        first = engine.submit(ids_of(), max_new_tokens=100, stopping_criteria=[hold])
        assert held.wait(60)
        second = engine.submit(ids_of(), max_new_tokens=4)
        for n in (2, 1):  # of two answers there is room for one: neither is taken
            response = call(app, "/v1/completions", {"prompt": "a", "n": n})
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        first.cancel()
        go_on.set()
        assert second.result(60).tokens == GREEDY(count=4)
        wait_for(lambda: engine.stats().finished.get("cancelled") == 2)
        complete(app, max_tokens=2)


def test_a_draining_server_says_so():
    with application() as app:
        app.state.engine.drain(60)
        response = call(app, "/v1/completions", {"prompt": "a"})
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_unavailable"
        assert call(app, "/health").status_code == 503 and call(app, "/health").json()["status"] == "draining"


def test_the_time_limit_of_requests(monkeypatch):
    forward = model().base.forward

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.05)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(model().base, "forward", slow)
    with application({"request_timeout": 0.2}) as app:
        response = call(app, "/v1/completions", {"prompt": "a", "max_tokens": 110, "num_draft_tokens": 0})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline")


def test_unusable_logits_end_their_own_request(app, monkeypatch):
    base = model().base
    forward = base.forward

    def spoiled(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        output.logits[keywords["input_ids"] == letters().convert_tokens_to_ids("z")] = torch.nan
        return output

    monkeypatch.setattr(base, "forward", spoiled)
    body = {"prompt": f"{PROMPT} z", "max_tokens": 6, "temperature": 0}
    response = call(app, "/v1/completions", body)
    assert response.status_code == 500 and "base" in response.json()["error"]["message"]
    streamed = events(call(app, "/v1/completions", {**body, "stream": True}).text)
    assert streamed[-1]["error"]["code"] == "generation_failed"
    assert complete(app, [OTHER], max_tokens=6)["choices"][0]["text"] == text_of(GREEDY(OTHER, 6))


def test_concurrent_requests_equal_those_alone(app):
    prompts = [
        " ".join(words) for words in (("the", "rain"), ("in", "spain"), ("stays",), ("mainly", "on", "a", "plain"))
    ] * 2

    async def run() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x", timeout=60) as client:

            async def one(prompt: str, count: int) -> str:
                body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
                return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

            return await asyncio.gather(*(one(prompt, 10 + i) for i, prompt in enumerate(prompts)))

    assert asyncio.run(run()) == [text_of(GREEDY(prompt, 10 + i)) for i, prompt in enumerate(prompts)]


def test_the_log_tells_of_a_request(app, caplog):
    with caplog.at_level("INFO", logger="specproxy.server"):
        call(app, "/v1/completions", {"prompt": PROMPT, "max_tokens": 3}, headers={"x-request-id": "seen"})
    fields = next(r.fields for r in caplog.records if r.getMessage() == "request")
    assert fields["request_id"] == "seen" and fields["status"] == 200
    assert fields["prompt_tokens"] == len(ids_of()) and fields["completion_tokens"] == 3
    assert fields["finish_reasons"] == ["length"]


def test_lines_of_the_log_are_json():
    record = logging.LogRecord("a", logging.INFO, "", 0, "an event", (), None)
    record.fields = {"request_id": "7"}
    line = json.loads(_JsonFormatter().format(record))
    assert (line["event"], line["request_id"], line["level"]) == ("an event", "7", "info")
    assert time.strptime(line["time"], "%Y-%m-%dT%H:%M:%S." + line["time"][-4:])
