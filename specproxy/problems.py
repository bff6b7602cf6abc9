"""Prompts and problems as JSON lines: files of the user's, and held-out ones of the embedded tasks.

Knows text only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specproxy.errors import ConfigurationError, PromptError

__all__ = ["QUESTION", "SPLITS", "Problem", "held_out", "held_out_file", "load_problems", "read_json_lines"]

QUESTION = "Question: {question}\nAnswer:"  # what a bare question is put into
SPLITS = ("validation", "test")

_DATA = Path(__file__).parent / "tasks" / "data"
_QUESTIONS = ("question", "Question")
_ANSWERS = ("answer", "Best Answer")


@dataclass(frozen=True)
class Problem:
    """A prompt, and the answer to it where one is known."""

    prompt: str
    answer: str | None = None


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its line's number; empty lines are left out.

    Raises:
        PromptError: naming the line that holds no object, or for a file without any.
        OSError: where the file cannot be read.
    """
    records = []
    # Not splitlines(): a string in JSON may hold separators of lines and paragraphs as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise PromptError(f"{path}, line {number} holds a {type(record).__name__}; give one JSON object per line.")
        records.append((number, record))
    if not records:
        raise PromptError(f"{path} holds no prompts; give one JSON object per line.")
    return records


def load_problems(path: Path, template: str = QUESTION, needs_answers: bool = False) -> list[Problem]:
    """Problems of a file of JSON lines.

    Args:
        path: each line holds `prompt`, taken as it is, or `question` or `Question`, put into the template; and `answer`
            or `Best Answer`, where there is one.
        template: with `{question}` in it.
        needs_answers: whether a line without an answer is an error.

    Raises:
        PromptError: naming the line that is not so, or for a file without any.
        OSError: where the file cannot be read.
    """
    problems = []
    for number, record in read_json_lines(path):
        prompt, question, answer = (_text(record, names) for names in (("prompt",), _QUESTIONS, _ANSWERS))
        if prompt is None and question is None:
            raise PromptError(f"{path}, line {number} has no text under prompt, question or Question.")
        if needs_answers and answer is None:
            raise PromptError(f"{path}, line {number} has no text under answer or Best Answer.")
        problems.append(Problem(prompt or template.replace("{question}", question or ""), answer))
    return problems


def _text(record: dict[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        if isinstance(record.get(name), str) and record[name]:
            return str(record[name])
    return None


def held_out_file(task: str, split: str = "test") -> Path:
    """JSON lines of an embedded task that no embedded model was trained on.

    Args:
        task: "arithmetic" (500 problems with solutions in each split) or "python" (heads of functions, test only).
        split: "validation", to choose alpha on, or "test".

    Raises:
        ConfigurationError: there is no such file.
    """
    path = _DATA / f"{task}_{split}.jsonl"
    if not path.exists():
        known = ", ".join(sorted(file.stem.replace("_", "/") for file in _DATA.glob("*.jsonl")))
        raise ConfigurationError(
            f"task={task!r}, split={split!r}: no held-out problems of that name; there are {known}."
        )
    return path


def held_out(task: str, split: str = "test", count: int | None = None) -> list[Problem]:
    """The first `count` held-out problems of an embedded task, all of them by default; see `held_out_file`."""
    return load_problems(held_out_file(task, split))[:count]
