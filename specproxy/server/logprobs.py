"""Logarithms of probabilities in the forms of both APIs. Knows tokenizers and the engine's entries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specproxy.engine import TokenLogprob
from specproxy.text import TextStream

__all__ = ["TokenTexts"]

_LEAST = -9999.0  # what OpenAI's API says of tokens that cannot come; JSON has no infinity
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


class TokenTexts:
    """What single tokens read as.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alphabet = {char: byte for byte, char in bytes_to_unicode().items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self._special = frozenset(tokenizer.all_special_ids)

    def raw(self, token: int) -> bytes:
        """The bytes of a token."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):  # an id that only pads the vocabulary
            return b""
        if token not in self._special:
            if self._is_byte_level and all(char in self._alphabet for char in name):
                return bytes(self._alphabet[char] for char in name)
            byte = _BYTE.fullmatch(name)
            if byte:
                return bytes([int(byte[1], 16)])
            if not self._is_byte_level and "\N{LOWER ONE EIGHTH BLOCK}" in name:
                return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text.encode()

    def text(self, token: int) -> str:
        """The text of a token by itself; bytes that are no character show as replacement characters."""
        return self.raw(token).decode(errors="replace")

    def pieces(self, tokens: Sequence[int], text: str) -> list[str]:
        """What each of several tokens adds to their common text, which shows special tokens or does not."""
        found: list[str] = []
        for skips in (False, True):
            stream = TextStream(self._tokenizer, skip_special_tokens=skips)
            found = [stream.push(token) for token in tokens]
            found[-1] += stream.flush()
            if "".join(found) == text:
                break
        return found

    # The form of completions.

    def completion(
        self,
        entries: Sequence[TokenLogprob | None],
        tokens: Sequence[int],
        texts: Sequence[str],
        offset: int,
        shows_top: bool,
    ) -> Logprobs:
        """Of a completion's tokens.

        Args:
            entries: one per token; None where there is no law, before the first token of a prompt.
            tokens: their ids.
            texts: what each adds to the text, which gives the offsets.
            offset: of the first token in the choice's text.
            shows_top: whether likely alternatives were asked for.
        """
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        top = [self._top(entry) for entry in entries] if shows_top else None
        return Logprobs.model_construct(
            tokens=[self.text(token) for token in tokens],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
            top_logprobs=top,
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; where two read alike, the likelier."""
        if entry is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            named.setdefault(self.text(token), _finite(logprob))
        return named

    # The form of chats.

    def chat(self, entries: Sequence[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
        """Of an answer's tokens."""
        return [
            ChatCompletionTokenLogprob(
                token=self.text(entry.token),
                bytes=list(self.raw(entry.token)),
                logprob=_finite(entry.logprob),
                top_logprobs=[
                    TopLogprob(token=self.text(token), bytes=list(self.raw(token)), logprob=_finite(logprob))
                    for token, logprob in entry.top
                ],
            )
            for entry in entries
        ]

    # vLLM's form for prompts.

    def prompt(self, entries: Sequence[TokenLogprob | None]) -> list[dict[str, dict[str, Any]] | None]:
        """Of a prompt's tokens: per token the entries by id, itself first."""
        return [None if entry is None else self._by_id(entry) for entry in entries]

    def _by_id(self, entry: TokenLogprob) -> dict[str, dict[str, Any]]:
        found = [(entry.token, entry.logprob, entry.rank)]
        found += [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1) if token != entry.token]
        return {
            str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token)}
            for token, logprob, rank in found
        }
