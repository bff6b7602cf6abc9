"""Exact proxy-tuned text generation, several tokens a cycle.

`ProxyTunedModel` is the whole face: load or build one, then `generate()`; an `Engine` serves many requests with it.
Errors form one small tree under `SpecProxyError`.
"""

from specproxy.engine import Engine
from specproxy.errors import (
    ConfigurationError,
    EngineClosed,
    EngineFull,
    GraphCaptureError,
    LogitsError,
    PromptError,
    SpecProxyError,
    UnsupportedModelError,
    VocabularyError,
)
from specproxy.integrations.transformers import custom_generate
from specproxy.model import ProxyTunedModel
from specproxy.schedule import AlphaSchedule
from specproxy.stats import SpeculationStats
from specproxy.streaming import RowStreamer
from specproxy.suffix import LookupCorpus
from specproxy.version import __version__

__all__ = [
    "AlphaSchedule",
    "ConfigurationError",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "GraphCaptureError",
    "LogitsError",
    "LookupCorpus",
    "PromptError",
    "ProxyTunedModel",
    "RowStreamer",
    "SpecProxyError",
    "SpeculationStats",
    "UnsupportedModelError",
    "VocabularyError",
    "__version__",
    "custom_generate",
]
