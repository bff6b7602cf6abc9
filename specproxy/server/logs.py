"""Logs of a line of JSON each, on standard error. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

__all__ = ["configure", "log", "logger"]

logger = logging.getLogger("specproxy.server")


class _JsonFormatter(logging.Formatter):
    """A record as one line: time, level, event, and the fields given with it."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Send the server's and uvicorn's records to standard error as lines of JSON.

    Args:
        level: the least important level that is shown.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    for name in ("specproxy", "uvicorn"):
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False
        own.setLevel(level.upper())


def log(event: str, **fields: Any) -> None:
    """Log an event with fields of its own."""
    logger.info(event, extra={"fields": fields})
