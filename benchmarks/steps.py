"""Steps of a long check that is run in several short calls: what is finished is kept on disk and not run again.

Knows nothing of what the steps do.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

__all__ = ["FINISHED", "PASSED", "Skipped", "Step", "load", "run_steps", "store"]

PASSED, FAILED, SKIPPED, ERROR = "passed", "failed", "skipped", "error"
FINISHED = (PASSED, FAILED, SKIPPED)  # an error may be the machine's: such a step is run again


class Skipped(Exception):
    """Raised by a step that cannot run here; the message says why."""


@dataclass(frozen=True)
class Step:
    """A named piece of work.

    Args:
        run: returns its figures, and the faults it found: none means that it passed. Raises `Skipped`.
        seconds: what it takes at most, roughly: it is not begun with less time left.
    """

    name: str
    run: Callable[[], tuple[dict[str, Any], list[str]]]
    seconds: float = 30.0


def load(path: Path) -> dict[str, Any]:
    """What an earlier call has left, or an empty record."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": {}}


def store(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run_steps(
    steps: Sequence[Step],
    path: Path,
    about: dict[str, Any],
    budget_seconds: float,
    say: Callable[[str], None],
    again: Sequence[str] = (),
    broken: Callable[[], str | None] = lambda: None,
) -> dict[str, Any]:
    """Run the steps that are not finished yet, in order, while time is left; the record is stored after each.

    Args:
        path: of the record, JSON.
        about: what the figures cannot be read without (device, versions); kept with every step.
        budget_seconds: no step begins that would end after so long.
        say: told of every step in one line.
        again: names, or their beginnings, of finished steps to run once more.
        broken: asked after every step; a word on why nothing further can run in this process counts as the step's
            error, and ends the call.

    Returns:
        The record: `steps` by name with `status`, `seconds`, `faults`, `result`, `about`; `missing`: steps not run yet.
    """
    began = perf_counter()
    record = load(path)
    done = record["steps"]
    for step in steps:
        if done.get(step.name, {}).get("status") in FINISHED and not step.name.startswith(tuple(again) or ("\0",)):
            continue
        if perf_counter() - began + step.seconds > budget_seconds:
            say(f"{step.name}: no time left in this call")
            continue
        start = perf_counter()
        result: dict[str, Any] = {}
        faults: list[str] = []
        try:
            result, faults = step.run()
            status = FAILED if faults else PASSED
        except Skipped as reason:
            status, faults = SKIPPED, [str(reason)]
        except Exception:  # the other steps shall still run; the record says what happened
            status, faults = ERROR, traceback.format_exc().splitlines()[-12:]
        trouble = broken()
        if trouble is not None:
            status, faults = ERROR, [*faults, trouble]
        done[step.name] = {
            "status": status,
            "seconds": round(perf_counter() - start, 2),
            "faults": faults,
            "result": result,
            "about": about,
        }
        record["missing"] = _missing(steps, done)
        store(path, record)
        say("\n    ".join([f"{step.name}: {status} in {done[step.name]['seconds']} s", *faults[:20]]))
        if trouble is not None:
            break
    record["missing"] = _missing(steps, done)
    store(path, record)
    return record


def _missing(steps: Sequence[Step], done: dict[str, Any]) -> list[str]:
    return [step.name for step in steps if done.get(step.name, {}).get("status") not in FINISHED]
