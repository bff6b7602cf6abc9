"""Failures in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` with the status that clients act on.

Knows the wire and the project's errors, nothing of routes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from specproxy.errors import EngineClosed, EngineFull, SpecProxyError
from specproxy.server.logs import logger
from specproxy.server.wire import ErrorBody

__all__ = ["WireError", "add_handlers", "error_content", "error_response", "from_exception"]

_RETRY_AFTER = "1"  # seconds; rows of short texts are free sooner
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class WireError(Exception):
    """A failure with its status.

    Args:
        status: of HTTP.
        message: a sentence for the caller.
        param: the field that it is about.
        code: a word that programs compare.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_content(error: WireError) -> dict[str, Any]:
    """The body that tells of a failure."""
    kind = _KINDS.get(error.status, "server_error")
    return {"error": ErrorBody(message=error.message, type=kind, param=error.param, code=error.code).model_dump()}


def error_response(error: WireError) -> JSONResponse:
    """The response that tells of a failure."""
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = _RETRY_AFTER
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_content(error), error.status, headers)


def from_exception(error: Exception) -> WireError:
    """What a failure of the engine or of an argument is on the wire."""
    if isinstance(error, WireError):
        return error
    if isinstance(error, EngineFull):
        return WireError(429, str(error), code="queue_full")
    if isinstance(error, EngineClosed):
        return WireError(503, str(error), code="engine_unavailable")
    if isinstance(error, SpecProxyError) and isinstance(error, ValueError):
        too_long = "max_model_len" in str(error) or "positions" in str(error)
        return WireError(400, str(error), code="context_length_exceeded" if too_long else None)
    logger.error("a request has failed", exc_info=error)
    return WireError(500, f"{type(error).__name__}: the request failed; the log of the server tells more.")


def _from_validation(error: RequestValidationError) -> WireError:
    """The first thing that is wrong with a body, named by its field."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = place[0] if place and first["type"] != "json_invalid" else None
    if first["type"] == "json_invalid":
        return WireError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    if not place and first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type"):
        return WireError(400, "the body is no JSON object; send one, with Content-Type: application/json.")
    if first["type"] == "extra_forbidden":
        return WireError(400, f"{'.'.join(place)} is not a known parameter; leave it out.", param=param)
    message = first["msg"].removeprefix("Value error, ")
    return WireError(400, f"{'.'.join(place)}: {message}" if place else message, param=param)


def add_handlers(app: FastAPI) -> None:
    """Let every failure of an application's routes take OpenAI's form."""

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = error_response(WireError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    async def on_any(request: Request, error: Exception) -> JSONResponse:
        return error_response(from_exception(error))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(WireError, on_any)
    app.add_exception_handler(SpecProxyError, on_any)
