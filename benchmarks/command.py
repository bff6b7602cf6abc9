"""A benchmark as a program: its record on standard output, its failures in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from specproxy import SpecProxyError

__all__ = ["run_command"]


def run_command(measured: Callable[[Sequence[str] | None], dict[str, Any]], arguments: Sequence[str] | None) -> int:
    """Measure and print.

    Args:
        measured: from a command line to a record that is ready for JSON.
        arguments: of the command line; None: of this process.

    Returns:
        The exit code: 0, or 2 after an error, which stands on standard error in one line.
    """
    try:
        print(json.dumps(measured(arguments)))
    except (SpecProxyError, ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
