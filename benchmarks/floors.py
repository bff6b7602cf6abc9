"""The least time that the fused operations can take on a device, from the bytes they must move.

    floor = bytes read / bandwidth of a copy in the same run

Logits are never written; tokens, laws and verdicts are negligible beside them. A pass reads, per row and vocabulary
id, the base's logit and two per pair: 6 bytes in bfloat16. Knows arithmetic alone.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bar", "Verdict", "attention_bytes", "draft_bytes", "floor_us", "judge", "read_rows", "verify_bytes"]


def read_rows(rule: str, batch: int, window: int, greedy: bool = False) -> int:
    """Rows of logits that verification must read, counting each time.

    `rejection` reads every position once for its normaliser, and the row of the next token again, whose residual needs
    the normaliser of p; `block` reads every drafted position again, because each one's residual mass enters the
    acceptance; `coupled` and greedy rows race in the first pass. Filters change nothing here: a pass that only finds a
    threshold is a price, not a need.
    """
    if greedy or rule == "coupled":
        return batch * window
    if rule == "rejection":
        return batch * (window + (window > 1))
    if rule == "block":
        return batch * (window + window - 1)
    raise ValueError(f"{rule!r} is not a rule of acceptance.")


def verify_bytes(
    rule: str,
    batch: int,
    window: int,
    vocab_size: int,
    element_bytes: int,
    greedy: bool = False,
    num_pairs: int = 1,
    penalty: bool = False,
) -> int:
    """Bytes that `verify_window` must read.

    Args:
        element_bytes: of one logit.
        num_pairs: experts with an anti-expert each.
        penalty: the tokens seen so far are read too, one byte each, once a row of the batch.
    """
    per_id = element_bytes * (1 + 2 * num_pairs)
    seen = batch * vocab_size if penalty else 0
    return read_rows(rule, batch, window, greedy) * vocab_size * per_id + seen


def draft_bytes(batch: int, vocab_size: int, element_bytes: int, penalty: bool = False) -> int:
    """Bytes that `sample_drafts` must read: the drafter's logits of one position, once."""
    return batch * vocab_size * (element_bytes + penalty)


def attention_bytes(
    batch: int, window: int, length: int, heads: int, kv_heads: int, head_size: int, element_bytes: int
) -> int:
    """Bytes of window attention over rows of equal length: keys and values once, queries in, results out."""
    keys_and_values = 2 * batch * kv_heads * (length + window) * head_size
    queries_and_results = 2 * batch * heads * window * head_size
    return (keys_and_values + queries_and_results) * element_bytes


def floor_us(num_bytes: int, bandwidth: float) -> float:
    """Microseconds of moving so many bytes at so many bytes a second."""
    return num_bytes / bandwidth * 1e6


@dataclass(frozen=True)
class Bar:
    """A bound that a figure must keep: `value` at most (or at least) `limit`. A value of None was not measured."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    """A bar and whether it was kept; one that was not measured was not kept."""

    bar: Bar
    passed: bool
    text: str


def judge(bar: Bar) -> Verdict:
    """Hold a bar against its value."""
    sign = ">=" if bar.at_least else "<="
    if bar.value is None:
        return Verdict(bar, False, f"{bar.name}: not measured, wanted {sign} {bar.limit:g}")
    passed = bar.value >= bar.limit if bar.at_least else bar.value <= bar.limit
    return Verdict(bar, passed, f"{bar.name}: {bar.value:.3g}, wanted {sign} {bar.limit:g}")
