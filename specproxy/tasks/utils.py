"""What the task files of this folder call; the harness loads it from here. Knows documents and outputs."""

from __future__ import annotations

from typing import Any

from specproxy.integrations.lm_eval.data import embedded_problems, local_data, score_toxicity

__all__ = ["alpaca_prompt", "embedded_problems", "local_data", "output_length", "score_toxicity"]


def alpaca_prompt(doc: dict[str, Any]) -> str:
    """The instruction, and behind it its input where there is one."""
    return f"{doc['instruction']}\n\n{doc['input']}" if doc.get("input") else str(doc["instruction"])


def output_length(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Characters of an output, stripped: what can be said of it before it is judged."""
    return {"characters": float(len(results[0].strip()))}
