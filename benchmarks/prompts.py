"""Prompts for benchmarks: JSON lines, or the tasks of the embedded trio. Knows text only."""

from __future__ import annotations

import json
import random
from pathlib import Path

from specproxy import demo

__all__ = ["QUESTION", "demo_prompts", "load_prompts"]

QUESTION = "Question: {question}\nAnswer:"  # what a bare question is put into


def load_prompts(path: Path, template: str = QUESTION) -> list[str]:
    """Prompts of a file of JSON lines.

    Args:
        path: each line holds `prompt`, taken as it is, or `question` or `Question`, put into the template.
        template: with `{question}` in it.

    Raises:
        ValueError: naming the line that holds no prompt, or for a file without any.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        fields = record if isinstance(record, dict) else {}
        prompt = fields.get("prompt")
        question = fields.get("question", fields.get("Question"))
        if isinstance(prompt, str) and prompt:
            prompts.append(prompt)
        elif isinstance(question, str) and question:
            prompts.append(template.replace("{question}", question))
        else:
            raise ValueError(f"{path}, line {number} has no text under prompt, question or Question.")
    if not prompts:
        raise ValueError(f"{path} holds no prompts; give one JSON object per line.")
    return prompts


def demo_prompts(task: str, count: int) -> list[str]:
    """Prompts of an embedded task: its examples, and behind them held-out ones as its models' tests use them.

    Args:
        task: of the embedded trio. Arithmetic goes on with word problems, python with the heads of functions from the
            running interpreter's library.
        count: at most so many.
    """
    prompts = demo.example_prompts(task)
    if len(prompts) >= count:
        return prompts[:count]
    if task == "arithmetic":
        from training.arithmetic import problem_in

        rng = random.Random(0)
        prompts += [problem_in(rng, "test").prompt for _ in range(count - len(prompts))]
    elif task == "python":
        from training.data import python_source

        functions = [block.splitlines() for block in python_source("test") if block.startswith("def ")]
        prompts += ["\n".join(lines[:4]) + "\n" for lines in functions if len(lines) > 8]
    return prompts[:count]
