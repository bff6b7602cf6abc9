"""Prompts for benchmarks: JSON lines, or the tasks of the embedded trio. Knows text only."""

from __future__ import annotations

from pathlib import Path

from specproxy import demo
from specproxy.problems import QUESTION, held_out, load_problems

__all__ = ["QUESTION", "demo_prompts", "load_prompts", "repetitive_prompts"]

# Texts that the embedded Python trio goes on repeating, mostly in loops: chosen among 13 by how often lookup's drafts
# were accepted. They show what lookup gives where a text repeats, not how often texts do.
_REPETITIVE = (
    "import os\nimport sys\nimport json\n" * 6,
    "x = x + 1\n" * 12,
    'def add(a, b):\n    """Add two numbers.\n\n' + "    >>> add(1, 2)\n    3\n" * 6,
)


def load_prompts(path: Path, template: str = QUESTION) -> list[str]:
    """Prompts of a file of JSON lines.

    Args:
        path: each line holds `prompt`, taken as it is, or `question` or `Question`, put into the template.
        template: with `{question}` in it.

    Raises:
        PromptError: naming the line that holds no prompt, or for a file without any.
    """
    return [problem.prompt for problem in load_problems(path, template)]


def repetitive_prompts(count: int) -> list[str]:
    """At most `count` texts whose continuation by the embedded trio repeats them, for drafters that copy."""
    return list(_REPETITIVE[:count])


def demo_prompts(task: str, count: int) -> list[str]:
    """Prompts of an embedded task: its examples, and behind them held-out ones as its models' tests use them.

    Args:
        task: of the embedded trio. Arithmetic goes on with word problems, python with the heads of functions.
        count: at most so many.
    """
    prompts = demo.example_prompts(task)
    if len(prompts) >= count:
        return prompts[:count]
    return (prompts + [problem.prompt for problem in held_out(task)])[:count]
