"""Grammars by llguidance: JSON schemas, regular expressions, choices. Each is compiled once and walked by many rows.

Knows tokenizers, nothing of rows or of the decode loop. Needs the extra `serve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specproxy.config import MAX_DRAFT_TOKENS
from specproxy.errors import ConfigurationError

__all__ = ["CompiledGrammar", "GrammarCompiler"]

# Without a bound a model may write nothing but spaces until its budget ends.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n]?"}


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: a fast one.
        eos_token_ids: the tokens that end a text, at least one.

    Raises:
        ConfigurationError: the tokenizer cannot be used, there is no end token, or llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Collection[int]) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigurationError("structured output needs llguidance; install specproxy[serve].") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError(
                f"structured output needs a fast tokenizer; this one is a {type(tokenizer).__name__}."
            )
        if not eos_token_ids:
            raise ConfigurationError("structured output needs an end token, and the models name none.")
        self._matcher = llguidance.LLMatcher
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, eos_token=sorted(eos_token_ids))
        except Exception as error:  # the library raises whatever its parser of tokenizers has met
            raise ConfigurationError(f"structured output cannot use this tokenizer: {error}") from error

    def json_schema(self, schema: Mapping[str, Any]) -> CompiledGrammar:
        """Texts that are JSON by a schema.

        Raises:
            ConfigurationError: the schema is none, or uses what llguidance cannot do.
        """
        if not isinstance(schema, Mapping):
            raise ConfigurationError(f"the JSON schema {schema!r} is no object; give one such as {{'type': 'object'}}.")
        # `x-guidance` would let a schema set the options of the library.
        plain = {name: value for name, value in schema.items() if name != "x-guidance"}
        try:
            source = self._matcher.grammar_from_json_schema(json.dumps(plain), overrides=_JSON_OPTIONS)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the JSON schema is not usable: {error}") from error
        return self._compile("the JSON schema", source)

    def regex(self, pattern: str) -> CompiledGrammar:
        """Texts that a regular expression, in the syntax of Rust's `regex`, matches from end to end.

        Raises:
            ConfigurationError: the expression is not usable.
        """
        return self._compile("the regular expression", self._matcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> CompiledGrammar:
        """One of several texts.

        Raises:
            ConfigurationError: there are none, or one is empty.
        """
        if not texts or not all(texts):
            raise ConfigurationError(f"the choices {texts!r} must be texts, none of them empty; give at least one.")
        pattern = "|".join(re.sub(r"[^\w\s]", _escaped, text) for text in texts)
        return self._compile("the choice", self._matcher.grammar_from_regex(f"({pattern})"))

    def _compile(self, what: str, source: str) -> CompiledGrammar:
        matcher = self._matcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ConfigurationError(f"{what} is not usable: {' '.join(matcher.get_error().split())[:500]}")
        return CompiledGrammar(matcher)


def _escaped(match: re.Match[str]) -> str:
    """A character by its number, which no syntax reads as anything else."""
    return f"\\x{{{ord(match[0]):x}}}"


class CompiledGrammar:
    """A grammar at its beginning; see `specproxy.grammar.Grammar`.

    Args:
        matcher: llguidance's, that has read nothing; it stays so.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def walk(self) -> _Walk:
        """A walk from the beginning, for one row."""
        return _Walk(self._matcher.deep_copy())


class _Walk:
    """A matcher that follows the tokens that it is asked about: forwards, and back where drafts were refused."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._read: list[int] = []
        self._masks: dict[int, Tensor] = {}  # by number of tokens read; a verification asks what drafting has asked

    def mask(self, tokens: Sequence[int]) -> Tensor:
        """See `specproxy.grammar.GrammarWalk`.

        Raises:
            RuntimeError: the grammar has failed, as where it grows too complex.
        """
        common = _num_common(self._read, tokens)
        if common == len(tokens) and common in self._masks:
            return self._masks[common]
        back = len(self._read) - common
        if back:
            self._check(self._matcher.rollback(back))
            del self._read[common:]
            self._masks = {length: mask for length, mask in self._masks.items() if length <= common}
        new = list(tokens[common:])
        if new:
            self._check(self._matcher.consume_tokens(new))
            self._read += new
        packed = self._matcher.compute_bitmask()
        self._check(not self._matcher.is_error())
        mask = torch.frombuffer(bytearray(packed), dtype=torch.int32)
        self._masks[len(tokens)] = mask
        self._masks.pop(len(tokens) - MAX_DRAFT_TOKENS - 1, None)
        return mask

    def _check(self, has_worked: bool) -> None:
        if not has_worked:
            raise RuntimeError(f"the grammar has failed: {self._matcher.get_error() or 'a token was not expected'}")


def _num_common(read: list[int], tokens: Sequence[int]) -> int:
    """Leading tokens that agree. All do but for a few of the last, as a rule, so that slices settle most of it."""
    most = min(len(read), len(tokens))
    sure = max(most - MAX_DRAFT_TOKENS, 0)
    if read[:sure] != list(tokens[:sure]):
        sure = 0
    return next((i for i in range(sure, most) if read[i] != tokens[i]), most)
