"""Every error that specproxy raises on purpose.

    SpecProxyError
    ├── ConfigurationError     (ValueError)    an argument's value, or an unknown keyword
    ├── PromptError            (ValueError)    a prompt or its mask
    ├── VocabularyError        (ValueError)    tokenizers or vocabularies that do not fit together
    ├── UnsupportedModelError  (ValueError)    an architecture that cannot run here
    ├── LogitsError            (RuntimeError)  a model returned logits that no token can be drawn from
    ├── GraphCaptureError      (RuntimeError)  a model's work cannot be captured as a CUDA graph
    ├── EngineFull             (RuntimeError)  an engine's queue has no room for a further request
    └── EngineClosed           (RuntimeError)  an engine takes no further requests

A message names the argument, the value received and the remedy.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ConfigurationError",
    "EngineClosed",
    "EngineFull",
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


class EngineFull(SpecProxyError, RuntimeError):
    """As many requests wait as the engine's queue holds: try again later."""


class EngineClosed(SpecProxyError, RuntimeError):
    """The engine drains, is closed, or its loop has ended with an error."""


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
