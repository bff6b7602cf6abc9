"""How an engine is, and what it has done: what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from specproxy.stats import SpeculationStats

__all__ = ["EngineStats", "Health"]


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done; figures of a running engine may be a cycle apart.

    Args:
        running, reading, waiting: requests that decode, whose prompt is being read, in the queue.
        free_rows: of `max_batch_size`.
        kv_usage: positions taken, of all that `max_batch_size` rows of `max_model_len` would take.
        cycles: of the decode loop so far.
        failed_turns: cycles and prompts that broke off with an exception.
        prompt_tokens, reused_tokens: of the requests begun; whose keys and values came from another request.
        kept_prefixes, kept_positions: of ended requests, for prompts to come.
        finished: requests by "stop", "length", "cancelled", "deadline" and "error".
        windows: cycles by their number of drafts.
        speculation: counts over all requests.
    """

    running: int = 0
    reading: int = 0
    waiting: int = 0
    free_rows: int = 0
    kv_usage: float = 0.0
    cycles: int = 0
    failed_turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    kept_prefixes: int = 0
    kept_positions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


@dataclass(frozen=True)
class Health:
    """How an engine is.

    Args:
        state: "ready", "draining" (finishes what it has), "closed", or "dead" (its loop has ended with an error).
        reason: what it died of.
    """

    state: str
    reason: str | None = None
