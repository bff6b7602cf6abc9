"""Command: write the held-out problems that the package carries, into `specproxy/tasks/data`.

Arithmetic problems as question and answer, 500 of the validation and 500 of the test split, the same that
`training.evaluate` scores; and heads of functions from the source that is the Python task's test split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.arithmetic import unmark
from training.data import python_source
from training.evaluate import problems_of

COUNT = 500
HEAD_LINES = 4


def problem_lines(split: str, count: int = COUNT) -> list[str]:
    """Arithmetic problems of a split, a JSON object each."""
    return [
        json.dumps({"question": unmark(problem.question)[0], "answer": problem.tuned_answer.strip()})
        for problem in problems_of(split, count)
    ]


def head_lines() -> list[str]:
    """The first lines of functions of the test split, a JSON object each."""
    functions = [block.splitlines() for block in python_source("test") if block.startswith("def ")]
    heads = ["\n".join(lines[:HEAD_LINES]) + "\n" for lines in functions if len(lines) > 2 * HEAD_LINES]
    return [json.dumps({"prompt": head}) for head in heads]


def main() -> None:
    """Parses the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "specproxy" / "tasks" / "data")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"arithmetic_{split}": problem_lines(split) for split in ("validation", "test")}
    files["python_test"] = head_lines()
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
