"""Errors of requests, in the format of the route's protocol: OpenAI's or Anthropic's."""

import json
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError

from vitcop_server.route_rules import rules_of

RETRY_SECONDS = 5
"""``Retry-After``, in seconds, of each 503 that has none.

The queue is full, or the server is starting or shutting down.
"""

_MAX_ERROR_BYTES = 65536
_ERROR_TYPES = ("application/json", "text/plain", "")
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_ANTHROPIC_TYPES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}
"""Anthropic's error types by status.

All other statuses are ``invalid_request_error`` (4xx) or ``api_error`` (5xx).
"""


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The JSON body of an error, in vLLM's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class RequestError(VLLMValidationError, ValueError):
    """An error in a request; vLLM answers it with status 400 if our code does not catch it.

    Attributes:
        param: The header or body field to change.
    """

    def __init__(self, message: str, param: str) -> None:
        VLLMValidationError.__init__(self, message, parameter=param)
        self.param = param

    def __str__(self) -> str:
        return str(self.args[0])

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return error_body(str(self), "BadRequestError", HTTPStatus.BAD_REQUEST.value, self.param)


async def answer_deep_nesting(request: Request, error: Exception) -> JSONResponse:
    """Answer ``RecursionError`` with status 400: only a deeply nested body causes it."""
    message = "the body is nested too deeply"
    return JSONResponse(error_body(message, "BadRequestError", 400), HTTPStatus.BAD_REQUEST)


def use_openai_errors(args: Namespace) -> None:
    """Add :class:`OpenAIErrorMiddleware`, as the outermost, through vLLM's ``--middleware``."""
    args.middleware = [
        *args.middleware,
        f"{OpenAIErrorMiddleware.__module__}.{OpenAIErrorMiddleware.__qualname__}",
    ]


class OpenAIErrorMiddleware:
    """Gives every error the format of the route's protocol.

    vLLM answers missing keys, unknown routes, unknown methods and invalid JSON in other formats,
    and a full queue without ``Retry-After``. The format here is OpenAI's. On Anthropic's routes it
    is Anthropic's with OpenAI's fields inside. Successful answers, streams, and errors of more
    than 64 KiB pass unchanged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "HEAD":
            send = _ErrorFormatter(send, rules_of(scope).is_anthropic).send
        await self.app(scope, receive, send)


class _ErrorFormatter:
    """Formats one answer if it is an error; it buffers an error until the body is complete."""

    def __init__(self, send: Send, is_anthropic: bool) -> None:
        self._send = send
        self._is_anthropic = is_anthropic
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_formattable(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            more = message.get("more_body", False)
            if not more or len(self._body) > _MAX_ERROR_BYTES:
                await self._release(self._start, more)

    async def _release(self, start: Message, more: bool) -> None:
        self._start = None
        body = self._body
        if not more and len(body) <= _MAX_ERROR_BYTES:
            body = _format_error(start["status"], body, self._is_anthropic)
            headers = MutableHeaders(scope=start)
            headers["content-type"] = "application/json"
            headers["content-length"] = str(len(body))
            if start["status"] == HTTPStatus.SERVICE_UNAVAILABLE:
                headers.setdefault("Retry-After", str(RETRY_SECONDS))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _is_formattable(start: Message) -> bool:
    headers = Headers(raw=start.get("headers", []))
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return (
        start["status"] >= HTTPStatus.BAD_REQUEST
        and kind in _ERROR_TYPES
        and "content-encoding" not in headers
    )


def _format_error(status: int, body: bytes, is_anthropic: bool) -> bytes:
    """Add the missing fields of ``error`` to ``body``; all other fields stay."""
    phrase = _PHRASES.get(status, "Error")
    parsed = _parse_body(body)
    fields = parsed if isinstance(parsed, dict) else {}
    error = fields.get("error")
    if not isinstance(error, dict):
        message = error or fields.get("detail") or fields.get("message") or parsed or phrase
        fields, error = {}, {"message": message if isinstance(message, str) else json.dumps(parsed)}
    kind = phrase.replace(" ", "").replace("-", "").removesuffix("Error") + "Error"
    complete = {**error_body(phrase, kind, status)["error"], **error}
    if is_anthropic:
        fields = {"type": "error", **fields}
        complete["type"] = _anthropic_type(status)
    formatted = {**fields, "error": complete}
    return body if formatted == parsed else json.dumps(formatted).encode()


def _anthropic_type(status: int) -> str:
    is_client_fault = status < HTTPStatus.INTERNAL_SERVER_ERROR
    fallback = "invalid_request_error" if is_client_fault else "api_error"
    return _ANTHROPIC_TYPES.get(status, fallback)


def _parse_body(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace").strip()
