"""One replica: models and an engine of its own under the server's application. Knows Ray's deployments.

Ray hands requests to whichever replica has fewer; a stream stays with the replica that began it. A stopped replica gets
no more requests and is ended once it has answered those it has, or after `drain_timeout`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specproxy.engine import Engine
from specproxy.errors import EngineClosed
from specproxy.integrations.ray_serve.options import ReplicaOptions
from specproxy.model import ProxyTunedModel
from specproxy.server import create_app

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["Replica", "bind"]

HEADER = "x-replica"


class Replica:
    """What Ray runs in a process of its own, once per replica.

    Args:
        options: checked.

    Raises:
        SpecProxyError: the models cannot be loaded or do not fit; Ray then reports the deployment as failed.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        self._settings = options.settings
        self._engine = Engine(_load(options), **options.engine)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = create_app(self._engine, self._settings)
        app.add_middleware(_Named, name=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Ray asks this regularly, and replaces a replica that raises.

        Raises:
            EngineClosed: the engine's loop has ended: no request would be answered here any more.
        """
        health = self._engine.health
        if health.state in ("dead", "closed"):
            raise EngineClosed(f"the engine is {health.state} ({health.reason}); this replica has to be replaced.")

    def __del__(self) -> None:
        # Ray calls it behind the last request of a replica that it stops; where loading failed there is no engine.
        if hasattr(self, "_engine"):
            self._engine.close()


class _Named:
    """Middleware that tells which replica has answered.

    Args:
        app: the application.
        name: of the replica.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app, self._name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and name the replica in the answer's header."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self._name
            await send(message)

        await self._app(scope, receive, named)


def bind(replica: type[Replica], options: ReplicaOptions) -> Application:
    """The application of a class of replicas.

    Args:
        replica: `Replica`, or what a test makes of it.
        options: checked.
    """
    deployment = serve.deployment(name="specproxy", **options.deployment)(serve.ingress()(replica))
    application: Application = deployment.bind(options)
    return application


def _load(options: ReplicaOptions) -> ProxyTunedModel:
    dtype: Any = None if options.dtype is None else getattr(torch, options.dtype)
    if options.base is None:
        task = options.demo or "arithmetic"
        return ProxyTunedModel.demo(task, device=options.device, dtype=dtype, assistant=options.assistant)
    names: dict[str, Any] = {
        name: getattr(options, name) for name in ("base", "expert", "anti_expert", "assistant", "tokenizer")
    }
    return ProxyTunedModel.from_pretrained(**names, dtype=dtype, device_map=options.device, progress=False)
