"""``/ready``, and status 503 for requests that meet a shutdown or a dead engine."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.anthropic import serving as anthropic_serving
from vllm.entrypoints.serve.exception_handling.handlers.vllm_error import engine_error_handler
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import async_llm
from vllm.v1.engine.exceptions import EngineDeadError

from vitcop_server.errors import RETRY_SECONDS, error_body

_STATE_KEY = "vitcop_stopping"

router = APIRouter()


def note_shutdown(engine_client: Any, state: Any) -> None:
    """Record in ``state`` when vLLM's shutdown begins, and answer 503 to requests that it refuses.

    With ``--shutdown-timeout``, vLLM lets running requests finish. It still accepts new requests,
    and answers them with status 500. A request that was being prepared when shutdown began gets
    status 200 from it, and no tokens.
    """
    setattr(state, _STATE_KEY, False)
    stock_shutdown, stock_generate = engine_client.shutdown, engine_client.generate

    def shutdown(timeout: float | None = None) -> None:
        setattr(state, _STATE_KEY, True)
        for name in [*logging.root.manager.loggerDict]:
            if name.startswith(_LOGGERS):
                logging.getLogger(name).addFilter(_is_unexpected)
        stock_shutdown(timeout=timeout)

    async def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        has_tokens = False
        async with aclosing(stock_generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                has_tokens = has_tokens or any(answer.token_ids for answer in output.outputs)
                is_refused = not has_tokens and _is_aborted(output)
                if is_refused and _is_stopping(state):
                    raise StoppingError(_STOPPING, HTTPStatus.SERVICE_UNAVAILABLE)
                yield output

    engine_client.shutdown = shutdown
    engine_client.generate = generate


def _is_stopping(state: Any) -> bool:
    return getattr(state, _STATE_KEY, False)


def _is_aborted(output: Any) -> bool:
    return output.finished and all(answer.finish_reason == "abort" for answer in output.outputs)


class StoppingError(GracefulHTTPError):
    """The engine refused a request because the server stops."""


_STOPPING = "the server is shutting down"

_LOGGERS = (async_llm.__name__, "vllm.entrypoints.")
"""Beginnings of the names of loggers that log errors of requests."""


def _is_unexpected(record: logging.LogRecord) -> bool:
    """False for errors of an orderly shutdown that vLLM logs.

    vLLM ends the engine before the task that reads from it, and that task logs an error. A stream
    logs what ends it; Anthropic's, which translates a stream of the chat route, logs that it cannot
    parse the error in it.
    """
    expected: tuple[type[Exception], ...] = (EngineDeadError, StoppingError)
    if record.name == anthropic_serving.__name__:
        expected += (ValidationError,)
    return not (record.exc_info and isinstance(record.exc_info[1], expected))


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(raw_request: Request) -> JSONResponse:
    """200 while the server accepts requests; 503 if it is shutting down or its engine is dead."""
    state = raw_request.app.state
    if _is_stopping(state):
        return _unavailable(_STOPPING)
    try:
        await state.engine_client.check_health()
    except EngineDeadError:
        return _unavailable("the engine is dead")
    return JSONResponse({"status": "ready"})


async def answer_dead_engine(request: Request, error: Exception) -> JSONResponse:
    """Answer status 503 to a request whose engine died; vLLM's 500 tells clients not to retry.

    Another replica can answer it, or this server after its restart.
    """
    assert isinstance(error, EngineDeadError)
    await engine_error_handler(request, error)  # logs the error, and ends the server
    return _unavailable(_DEAD_ENGINE)


async def answer_stopping(request: Request, error: Exception) -> JSONResponse:
    """Answer a request that the stopping engine refused as :class:`RefuseWhenStopping` would."""
    return _unavailable(_STOPPING)


class RefuseWhenStopping:
    """Answers 503 to requests that arrive after shutdown has begun; others finish."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and _is_stopping(scope["app"].state)
        ):
            await _unavailable(_STOPPING)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class BeginWithFirstEvent:
    """Sends status and headers of a stream together with its first event.

    vLLM sends them when it has queued the request. A proxy that has passed them on cannot send the
    request to another server, so a killed server would lose all streams that wait for their first
    token. If the engine dies or the server stops before the first event, the answer is 503, as it
    is without a stream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: Message | None = None
        is_refused = False

        async def send_later(message: Message) -> None:
            nonlocal held, is_refused
            if message["type"] == "http.response.start" and _is_stream(message):
                held = message
                return
            if held is not None:
                start, held = held, None
                why = _why_unavailable(scope["app"].state, message.get("body", b""))
                if why is not None:
                    is_refused = True
                    await _unavailable(why)(scope, receive, send)
                else:
                    await send(start)
            if not is_refused:
                await send(message)

        await self.app(scope, receive, send_later)


def _why_unavailable(state: Any, first_event: bytes) -> str | None:
    """Why a stream with this first event has no answer, if another server may have one."""
    if state.engine_client.errored:
        return _DEAD_ENGINE
    if _is_stopping(state) and first_event.startswith(_ERROR_EVENTS):
        return _STOPPING
    return None


_ERROR_EVENTS = (b'data: {"error"', b"event: error")
"""How errors begin in streams of OpenAI's and of Anthropic's routes."""


def _is_stream(start: Message) -> bool:
    content_type: str = Headers(raw=start.get("headers", [])).get("content-type", "")
    return content_type.startswith("text/event-stream")


_DEAD_ENGINE = "the engine died; the server stops"


def _unavailable(why: str) -> JSONResponse:
    return JSONResponse(
        error_body(why, "ServiceUnavailableError", 503),
        status_code=503,
        headers={"Retry-After": str(RETRY_SECONDS), "Connection": "close"},
    )
