"""Every error that specproxy raises on purpose.

    SpecProxyError
    ├── ConfigurationError     (ValueError)    an argument's value, or an unknown keyword
    ├── PromptError            (ValueError)    a prompt or its mask
    ├── VocabularyError        (ValueError)    tokenizers or vocabularies that do not fit together
    ├── UnsupportedModelError  (ValueError)    an architecture that cannot run here
    ├── LogitsError            (RuntimeError)  a model returned logits that no token can be drawn from
    └── GraphCaptureError      (RuntimeError)  a model's work cannot be captured as a CUDA graph

A message names the argument, the value received and the remedy.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ConfigurationError",
    "GraphCaptureError",
    "LogitsError",
    "PromptError",
    "SpecProxyError",
    "UnsupportedModelError",
    "VocabularyError",
]


class SpecProxyError(Exception):
    """Base of all errors raised by specproxy."""


class ConfigurationError(SpecProxyError, ValueError):
    """An argument has an unusable value, or is not known."""


class PromptError(SpecProxyError, ValueError):
    """A prompt is empty, too long, malformed, or holds ids that a model does not have."""


class VocabularyError(SpecProxyError, ValueError):
    """The three models do not share a vocabulary."""


class UnsupportedModelError(SpecProxyError, ValueError):
    """A model's architecture cannot run under ragged windows with rollback."""


class GraphCaptureError(SpecProxyError, RuntimeError):
    """A model synchronises with the host, or does what else a CUDA graph cannot hold."""


class LogitsError(SpecProxyError, RuntimeError):
    """Some rows met logits that no token can be drawn from; the other rows of the call are complete.

    Args:
        message: what happened, naming role, row and position.
        rows: indices of the failed rows.
        partial: what the call would have returned; failed rows end at their last good token.
    """

    def __init__(self, message: str, rows: list[int], partial: Any = None) -> None:
        super().__init__(message)
        self.rows = rows
        self.partial = partial
