"""The engine to embed: many requests at a time over one decode loop. Token ids in, token ids out; it knows no text.

engine.py      submit, drain, close; the thread
scheduler.py   one turn of the loop: ends, prompts, a cycle, tokens
prompts.py     the prompt that is being read
windows.py     windows for rows with limits of their own
queue.py       requests that wait
requests.py    from arguments to a request
handle.py      what a caller holds of it
prefixes.py    keys and values kept for prompts that begin alike
status.py      how an engine is
logprobs.py    logarithms of the combined law
"""

from specproxy.engine.engine import Engine
from specproxy.engine.handle import Block, RequestHandle, RequestOutput, Timings, TokenLogprob
from specproxy.engine.status import EngineStats, Health

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
