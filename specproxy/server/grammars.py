"""What answers are held to: compiled away from the event loop, and kept for the next request that asks for the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from functools import cached_property, lru_cache
from typing import Any

from specproxy.errors import ConfigurationError
from specproxy.grammar import Grammar
from specproxy.server.errors import WireError
from specproxy.server.wire import GenerationRequest
from specproxy.structured import GrammarCompiler

__all__ = ["Grammars"]

_KEPT = 64  # compiled grammars; clients send the same few schemas over and over


class Grammars:
    """Grammars of requests.

    Args:
        tokenizer: of the base.
        eos_token_ids: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._kept = lru_cache(maxsize=_KEPT)(self._compile)

    async def of(self, request: GenerationRequest) -> Grammar | None:
        """What the answer is held to; None: nothing.

        A schema of half a megabyte takes half a second, in which the other answers go on.

        Raises:
            WireError: 400 for what cannot be compiled.
        """
        if request.structure is None:
            return None
        kind, value = request.structure
        try:
            # The order of a schema's properties is the order of the answer's, so the keys are not sorted.
            return await asyncio.to_thread(self._kept, kind, json.dumps(value))
        except ConfigurationError as error:
            param = "response_format" if request.structured_outputs is None else "structured_outputs"
            raise WireError(400, str(error), param=param) from error

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        """Made at the first request that needs it."""
        return GrammarCompiler(self._tokenizer, self._eos_token_ids)

    def _compile(self, kind: str, value: str) -> Grammar:
        compilers: dict[str, Callable[[Any], Grammar]] = {
            "json": self._compiler.json_schema,
            "regex": self._compiler.regex,
            "choice": self._compiler.choice,
        }
        return compilers[kind](json.loads(value))
