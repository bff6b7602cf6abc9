"""The routes: OpenAI's completions and chats, and what vLLM's users know beside them.

Knows the service and the forms of answers; nothing of how tokens come about.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from specproxy.server.answers import ChatForm, CompletionForm, Usage
from specproxy.server.errors import error_content, from_exception
from specproxy.server.follow import collect, follow_all, release
from specproxy.server.gate import context_of
from specproxy.server.logprobs import TokenTexts
from specproxy.server.metrics import Metrics
from specproxy.server.playground import playground_response
from specproxy.server.service import Choice, Prompt, Service
from specproxy.server.streams import DONE, EventStream, event, unless_disconnected
from specproxy.server.wire import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    TokenizeRequest,
)
from specproxy.version import __version__

__all__ = ["make_router"]

_JSON = "application/json"
_LEFT = 499  # of the log alone: the client reads no answer any more
_FAILURES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}


def _dump(answer: Any) -> str:
    text: str = answer.model_dump_json(exclude_unset=True, warnings=False)
    return text


def make_router(service: Service, metrics: Metrics) -> APIRouter:
    """All routes over one service."""
    router = APIRouter(responses=_FAILURES)
    token_texts = TokenTexts(service.tokenizer)

    # Generation.

    async def answer(
        http: Request,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        form: CompletionForm | ChatForm,
    ) -> Response:
        context = context_of(http.scope)
        grammar = await service.grammars.of(request)
        choices = service.submit(request, prompts, context.request_id, grammar)
        usage = Usage(choices)

        def end() -> None:
            release(choices, metrics)
            figures = usage()
            context.fields |= {
                "choices": len(choices),
                "prompt_tokens": figures.prompt_tokens,
                "completion_tokens": figures.completion_tokens,
                "finish_reasons": [c.handle.output.finish_reason if c.handle.output else "cancelled" for c in choices],
            }

        if request.stream:
            return EventStream(events(request, choices, form, usage), end)
        try:
            results = await unless_disconnected(http.receive, collect(choices, metrics))
            if results is None:
                return Response(status_code=_LEFT)
            for result in results:
                usage.add_result(result)
            return Response(_dump(form.whole(results, usage())), media_type=_JSON)
        finally:
            end()

    async def events(
        request: CompletionRequest | ChatRequest,
        choices: Sequence[Choice],
        form: CompletionForm | ChatForm,
        usage: Usage,
    ) -> AsyncGenerator[bytes, None]:
        options = request.stream_options
        includes_usage = options is not None and options.include_usage
        is_continuous = options is not None and options.continuous_usage_stats
        offsets = [len(choice.prompt.text) if getattr(request, "echo", False) else 0 for choice in choices]

        def told(chunk: Any) -> bytes:
            if is_continuous:
                chunk.usage = usage()
            elif includes_usage:
                chunk.usage = None
            return event(_dump(chunk))

        try:
            for choice in choices:
                opening = form.opening(choice)
                if opening is not None:
                    yield told(opening)
            async for piece in follow_all(choices, metrics):
                usage.add(piece)
                yield told(form.chunk(piece, offsets[piece.choice.index]))
                offsets[piece.choice.index] += len(piece.text)
            if includes_usage:
                yield event(_dump(form.usage_chunk(usage())))
        except Exception as error:
            yield event(JSONResponse(error_content(from_exception(error))).body.decode())  # type: ignore[union-attr]
        yield DONE

    @router.post("/v1/completions", tags=["generation"])
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Continue one or several prompts."""
        service.check_model(request.model)
        name = f"cmpl-{context_of(http.scope).request_id}"
        form = CompletionForm(request, name, request.model or service.model_name, token_texts)
        return await answer(http, request, service.completion_prompts(request), form)

    @router.post("/v1/chat/completions", tags=["generation"])
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation."""
        service.check_model(request.model)
        name = f"chatcmpl-{context_of(http.scope).request_id}"
        form = ChatForm(request, name, request.model or service.model_name, token_texts)
        return await answer(http, request, [service.render(request.conversation)], form)

    # Models and tokens.

    def described(name: str) -> dict[str, Any]:
        length = service.engine.max_model_len
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "specproxy",
            "max_model_len": length,
        }

    @router.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        """The model's names."""
        return {"object": "list", "data": [described(name) for name in service.settings.model_names]}

    @router.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> dict[str, Any]:
        """One name of the model."""
        service.check_model(name)
        return described(name)

    @router.post("/tokenize", tags=["tokens"])
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a prompt, or of a conversation as the base reads it."""
        service.check_model(request.model)
        if request.messages is not None:
            ids = service.render(ChatRequest(messages=request.messages).conversation).base
        else:
            assert request.prompt is not None
            ids = service.encode(request.prompt, adds_special_tokens=request.add_special_tokens)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}
        if request.return_token_strs:
            found["token_strs"] = [token_texts.text(token) for token in ids]
        return found

    @router.post("/detokenize", tags=["tokens"])
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        service.check_model(request.model)
        return {"prompt": service.decode(request.tokens)}

    # The server itself.

    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        """A page to try the server."""
        return playground_response()

    @router.get("/health", tags=["server"])
    async def health() -> Response:
        """Whether requests are taken: 200, else 503."""
        state = service.engine.health
        content = {"status": "ok" if state.state == "ready" else state.state, "reason": state.reason}
        return JSONResponse(content, 200 if state.state == "ready" else 503)

    @router.get("/metrics", tags=["server"])
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get("/version", tags=["server"])
    async def version() -> dict[str, str]:
        """The version of the package."""
        return {"version": __version__}

    return router
