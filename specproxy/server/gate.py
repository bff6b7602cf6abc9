"""What every request passes before its route: a name, the key, a bound on its body; and what is logged behind it.

Plain ASGI, so that streams are neither buffered nor cut off from their client's leaving. Knows no route.
"""

from __future__ import annotations

import re
import secrets
import uuid
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specproxy.server.errors import WireError, error_response, from_exception
from specproxy.server.logs import log
from specproxy.server.settings import ServerSettings

__all__ = ["Context", "Gate", "context_of"]

# Probes and scrapers carry no key, and the page asks for it before it can send any.
_OPEN = ("/", "/health", "/metrics", "/version")
_SCOPE_KEY = "specproxy"
_NAME = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass
class Context:
    """What is known of a request beside its content.

    Args:
        request_id: from its header `x-request-id`, or made.
        fields: for the log.
    """

    request_id: str
    fields: dict[str, Any] = field(default_factory=dict)


def context_of(scope: Scope) -> Context:
    """The context that the gate has given a request."""
    context: Context = scope[_SCOPE_KEY]
    return context


class Gate:
    """Middleware around the whole application.

    Args:
        app: the application.
        settings: of the server.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        context = Context(given if _NAME.fullmatch(given) else uuid.uuid4().hex)
        scope[_SCOPE_KEY] = context
        began, status = monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = context.request_id
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self._app(scope, self._bounded(receive), named)
            except Exception as error:
                if status:
                    raise
                await error_response(from_exception(error))(scope, receive, named)
        finally:
            seconds = round(monotonic() - began, 6)
            place = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": seconds}
            log("request", request_id=context.request_id, **place, **context.fields)

    def _check(self, scope: Scope, headers: Headers) -> None:
        key = self._settings.api_key
        if key is not None and scope["path"] not in _OPEN:
            kind, _, token = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not secrets.compare_digest(token.encode(), key.encode()):
                raise WireError(
                    401, "the API key is missing or wrong; send it as a bearer token.", code="invalid_api_key"
                )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> WireError:
        message = f"the body is larger than the server's {self._settings.max_body_bytes} bytes."
        return WireError(413, message, code="request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, until the body has become too large: it may come in pieces that name no length."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_large().message)  # what reads a body lets these alone pass
            return message

        return bounded
