"""uvicorn around the application, and an orderly end: SIGTERM lets every request finish. Knows nothing of routes."""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import closing
from types import FrameType

import uvicorn
from fastapi import FastAPI

from specproxy.engine import Engine
from specproxy.server.logs import log

__all__ = ["serve"]


class _Server(uvicorn.Server):
    """A server that drains its engine before it ends.

    Until the engine has finished the server goes on answering, so that whoever asks learns that it is on its way out.

    Args:
        config: of uvicorn.
        engine: to drain.
        drain_timeout: seconds; what has not finished by then is cut off.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_timeout: float) -> None:
        super().__init__(config)
        self._engine, self._drain_timeout = engine, drain_timeout
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at the second. The process then ends with exit code 0."""
        if self._draining:
            self.force_exit = self.should_exit = True
            return
        self._draining = True
        log("draining", signal=signal.Signals(sig).name)
        threading.Thread(target=self._drain, name="specproxy-drain", daemon=True).start()

    def _drain(self) -> None:
        finished = self._engine.drain(self._drain_timeout)
        log("drained", finished=finished)
        if not finished:
            self._engine.close()
        self.should_exit = True


def serve(app: FastAPI, engine: Engine, *, host: str, port: int, drain_timeout: float, log_level: str = "info") -> None:
    """Serve until a signal ends it; the engine is closed afterwards.

    Args:
        app: the application.
        engine: under it.
        host, port: to listen on; port 0 takes a free one.
        drain_timeout: seconds that requests under way have once a signal has come.
        log_level: least important level of uvicorn's records.

    Raises:
        OSError: the address cannot be had.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        log_level=log_level,
        access_log=False,  # the gate logs every request
        timeout_graceful_shutdown=max(1, round(drain_timeout)),
        lifespan="off",
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener, closing(engine):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        log("listening", host=host, port=listener.getsockname()[1])
        _Server(config, engine, drain_timeout).run(sockets=[listener])
