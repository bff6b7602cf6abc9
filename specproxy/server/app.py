"""The ASGI application over an engine: for uvicorn, for a test, or to be wrapped by another framework."""

from __future__ import annotations

from fastapi import FastAPI

from specproxy.engine import Engine
from specproxy.server.errors import add_handlers
from specproxy.server.gate import Gate
from specproxy.server.metrics import Metrics
from specproxy.server.routes import make_router
from specproxy.server.service import Service
from specproxy.server.settings import ServerSettings
from specproxy.version import __version__

__all__ = ["create_app"]


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """An application that serves an engine.

    The engine stays the caller's: the application neither starts, drains nor closes it. While it drains, or once it is
    closed, requests are answered with 503.

    Args:
        engine: whose model has a tokenizer.
        settings: names, limits, key, templates; the defaults without.

    Raises:
        ConfigurationError: the model has no tokenizer, or a template cannot be used.

    Example:
        >>> engine = Engine(ProxyTunedModel.demo())
        >>> app = create_app(engine, ServerSettings(model_names=("demo",)))
        >>> uvicorn.run(app)
    """
    settings = ServerSettings() if settings is None else settings
    service = Service(engine, settings)
    app = FastAPI(title="specproxy", version=__version__, description="Proxy-tuned generation in OpenAI's protocol.")
    add_handlers(app)
    app.include_router(make_router(service, Metrics(engine.stats, service.model_name)))
    app.add_middleware(Gate, settings=settings)
    return app
