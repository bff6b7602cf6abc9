"""The engine to embed: many requests at a time over one decode loop. Token ids in, token ids out; it knows no text.

engine.py      submit, drain, close; the thread
scheduler.py   one turn of the loop: ends, prompts, a cycle, tokens
requests.py    from arguments to a request
handle.py      what a caller holds of it
prefixes.py    keys and values kept for prompts that begin alike
logprobs.py    logarithms of the combined law
"""

from specproxy.engine.engine import Engine, EngineStats, Health
from specproxy.engine.handle import Block, RequestHandle, RequestOutput, Timings, TokenLogprob

__all__ = [
    "Block",
    "Engine",
    "EngineStats",
    "Health",
    "RequestHandle",
    "RequestOutput",
    "Timings",
    "TokenLogprob",
]
