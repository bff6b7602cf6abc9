"""Answers in OpenAI's forms: whole, or a chunk for every cycle. Knows choices and their pieces; nothing of HTTP.

A form is made for one request. What is asked for beyond OpenAI's fields (token ids, speculation, prompt logprobs)
stands beside them under vLLM's names, or this project's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, chat_completion
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.completion_usage import PromptTokensDetails

from specproxy.engine import Block, RequestOutput
from specproxy.server.follow import Piece, Result
from specproxy.server.logprobs import TokenTexts
from specproxy.server.service import Choice
from specproxy.server.wire import ChatRequest, CompletionRequest
from specproxy.state import BASE

__all__ = ["ChatForm", "CompletionForm", "Usage"]

Chunk = Completion | ChatCompletionChunk


class Usage:
    """Tokens of one request, as they come.

    Args:
        choices: of the request; a prompt counts once, however many answers it has.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._prompt = sum(len(choice.prompt.base) for choice in _one_per_prompt(choices))
        self._first = {choice.index for choice in _one_per_prompt(choices)}
        self._new = self._reused = 0

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self._new += len(piece.tokens)
        if piece.end is not None and piece.choice.index in self._first:
            self._reused += piece.end.num_reused_tokens

    def add_result(self, result: Result) -> None:
        """Count a whole choice."""
        self.add(Piece(result.choice, tokens=tuple(result.end.tokens), end=result.end))

    def __call__(self) -> CompletionUsage:
        """The figures by now."""
        return CompletionUsage(
            prompt_tokens=self._prompt,
            completion_tokens=self._new,
            total_tokens=self._prompt + self._new,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._reused),
        )


def _one_per_prompt(choices: Sequence[Choice]) -> list[Choice]:
    return list({id(choice.prompt): choice for choice in reversed(choices)}.values())


def _ending(choice: Choice, end: RequestOutput) -> dict[str, Any]:
    """Why a choice ended: OpenAI's reason, and the stop string or token where one did it."""
    by = choice.text.stopped_by
    return {"finish_reason": end.finish_reason, "stop_reason": by}


def _speculation(end: RequestOutput) -> dict[str, Any]:
    """Figures of one choice, and when things happened."""
    figures = end.statistics.to_dict()
    figures.pop("seconds"), figures.pop("token_sources")
    timings = end.timings
    seconds = {
        "queue": timings.queue_seconds,
        "first_token": timings.first_token_seconds,
        "total": timings.total_seconds,
    }
    return {**figures, "seconds": {name: value for name, value in seconds.items() if value is not None}}


class _Form:
    """What both forms share.

    Args:
        request: asks for it.
        name: of the answer.
        model: its name in answers.
        token_texts: of the tokenizer.
    """

    def __init__(
        self, request: CompletionRequest | ChatRequest, name: str, model: str, token_texts: TokenTexts
    ) -> None:
        self.request, self.token_texts = request, token_texts
        self.head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}

    def _piece_extras(self, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.request.return_token_ids:
            extras["token_ids"] = list(piece.tokens)
        if self.request.return_speculation:
            extras["speculation"] = {"token_texts": piece.texts, "token_sources": list(piece.sources)}
            if piece.block is not None:
                extras["speculation"]["cycle"] = self._cycle(piece.block)
            if piece.end is not None:
                extras["speculation"] |= _speculation(piece.end)
        return extras

    def _cycle(self, block: Block) -> dict[str, Any]:
        """What became of a cycle's drafts."""
        return {
            "drafter": block.drafter,
            "num_draft_tokens": block.num_draft_tokens,
            "num_accepted_tokens": block.sources.count("draft"),
            "refused_texts": [self.token_texts.text(token) for token in block.refused],
        }

    def _result_extras(self, result: Result) -> dict[str, Any]:
        end = result.end
        extras = self._piece_extras(
            Piece(result.choice, "", result.texts, tuple(end.tokens), tuple(end.sources), end=end)
        )
        if self.request.prompt_logprobs is not None and end.prompt_logprobs is not None:
            extras["prompt_logprobs"] = self.token_texts.prompt(end.prompt_logprobs)
        return extras


class CompletionForm(_Form):
    """Of `/v1/completions`."""

    request: CompletionRequest

    def whole(self, results: Sequence[Result], usage: CompletionUsage) -> Completion:
        """The answer to a request that does not stream."""
        return Completion.model_construct(
            **self.head, object="text_completion", choices=[self._choice(result) for result in results], usage=usage
        )

    def _choice(self, result: Result) -> CompletionChoice:
        prompt, end = result.choice.prompt, result.end
        echo = prompt.text if self.request.echo else ""
        ids: dict[str, Any] = {"prompt_token_ids": prompt.base} if self.request.return_token_ids else {}
        logprobs = None
        if self.request.logprobs is not None:
            tokens, texts, entries = list(end.tokens), list(result.texts), list(end.logprobs or [])
            if self.request.echo:
                tokens = [*prompt.base, *tokens]
                texts = [*self.token_texts.pieces(prompt.base, prompt.text), *texts]
                entries = [*(end.prompt_logprobs or []), *entries]  # type: ignore[list-item]
            logprobs = self.token_texts.completion(entries, tokens, texts, 0, self.request.logprobs > 0)
        return CompletionChoice.model_construct(
            index=result.choice.index,
            text=echo + result.text,
            logprobs=logprobs,
            **_ending(result.choice, end),
            **ids,
            **self._result_extras(result),
        )

    def opening(self, choice: Choice) -> Completion | None:
        """What a stream tells of a choice before its first token."""
        if not (self.request.echo or self.request.return_token_ids):
            return None
        ids: dict[str, Any] = {"prompt_token_ids": choice.prompt.base} if self.request.return_token_ids else {}
        text = choice.prompt.text if self.request.echo else ""
        return self._chunk(index=choice.index, text=text, logprobs=None, finish_reason=None, **ids)

    def chunk(self, piece: Piece, offset: int) -> Completion:
        """What a stream tells of a piece; `offset` is the length of the choice's text before it."""
        logprobs = None
        if self.request.logprobs is not None and piece.tokens:
            logprobs = self.token_texts.completion(
                piece.logprobs, piece.tokens, piece.texts, offset, self.request.logprobs > 0
            )
        ending = {"finish_reason": None} if piece.end is None else _ending(piece.choice, piece.end)
        return self._chunk(
            index=piece.choice.index, text=piece.text, logprobs=logprobs, **ending, **self._piece_extras(piece)
        )

    def _chunk(self, **choice: Any) -> Completion:
        return Completion.model_construct(
            **self.head, object="text_completion", choices=[CompletionChoice.model_construct(**choice)]
        )

    def usage_chunk(self, usage: CompletionUsage) -> Completion:
        """The last chunk of a stream that tells its usage."""
        return Completion.model_construct(**self.head, object="text_completion", choices=[], usage=usage)


class ChatForm(_Form):
    """Of `/v1/chat/completions`."""

    request: ChatRequest

    def whole(self, results: Sequence[Result], usage: CompletionUsage) -> ChatCompletion:
        """The answer to a request that does not stream."""
        prompt = results[0].choice.prompt
        ids: dict[str, Any] = {"prompt_token_ids": prompt.base} if self.request.return_token_ids else {}
        return ChatCompletion.model_construct(
            **self.head,
            object="chat.completion",
            choices=[self._choice(result) for result in results],
            usage=usage,
            **ids,
        )

    def _choice(self, result: Result) -> chat_completion.Choice:
        logprobs = None
        if self.request.logprobs:
            logprobs = chat_completion.ChoiceLogprobs(
                content=self.token_texts.chat(result.end.logprobs or []), refusal=None
            )
        return chat_completion.Choice.model_construct(
            index=result.choice.index,
            message=ChatCompletionMessage(role="assistant", content=result.text, refusal=None),
            logprobs=logprobs,
            **_ending(result.choice, result.end),
            **self._result_extras(result),
        )

    def opening(self, choice: Choice) -> ChatCompletionChunk:
        """What a stream tells of a choice before its first token: who speaks."""
        delta = chunk_types.ChoiceDelta(role="assistant", content="")
        chunk = self._chunk(index=choice.index, delta=delta, logprobs=None, finish_reason=None)
        if self.request.return_token_ids:
            chunk.prompt_token_ids = choice.prompt.ids[BASE]  # type: ignore[attr-defined]
        return chunk

    def chunk(self, piece: Piece, offset: int) -> ChatCompletionChunk:
        """What a stream tells of a piece."""
        logprobs = None
        if self.request.logprobs and piece.tokens:
            logprobs = chunk_types.ChoiceLogprobs(content=self.token_texts.chat(piece.logprobs), refusal=None)
        delta = chunk_types.ChoiceDelta(content=piece.text) if piece.text or piece.tokens else chunk_types.ChoiceDelta()
        ending = {"finish_reason": None} if piece.end is None else _ending(piece.choice, piece.end)
        return self._chunk(
            index=piece.choice.index, delta=delta, logprobs=logprobs, **ending, **self._piece_extras(piece)
        )

    def _chunk(self, **choice: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_construct(
            **self.head, object="chat.completion.chunk", choices=[chunk_types.Choice.model_construct(**choice)]
        )

    def usage_chunk(self, usage: CompletionUsage) -> ChatCompletionChunk:
        """The last chunk of a stream that tells its usage."""
        return ChatCompletionChunk.model_construct(**self.head, object="chat.completion.chunk", choices=[], usage=usage)
