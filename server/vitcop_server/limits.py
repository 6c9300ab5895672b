"""Limits of requests: bytes of a body, answers of a request, conversations of a batch."""

from collections.abc import MutableMapping, Sized
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs

from vitcop_server.errors import RequestError, error_body

MAX_ANSWERS = 128
"""Largest ``n``, as in OpenAI's API. vLLM's 16384 lets one request block the engine for minutes."""


def limit_answers(environ: MutableMapping[str, str]) -> None:
    """Let vLLM refuse an ``n`` above ``MAX_ANSWERS``, unless the operator set a limit."""
    environ.setdefault("VLLM_MAX_N_SEQUENCES", str(MAX_ANSWERS))


def refuse_many_conversations(conversations: Sized) -> None:
    """Refuse a batch with more conversations than the limit of ``n``; vLLM would accept it.

    Raises:
        RequestError: If the batch has more conversations.
    """
    max_conversations = envs.VLLM_MAX_N_SEQUENCES
    if len(conversations) > max_conversations:
        raise RequestError(
            f"messages must have at most {max_conversations} conversations, not "
            f"{len(conversations)}: split the batch",
            param="messages",
        )


class BodyLimit:
    """Answers 413 to a body larger than ``max_bytes``, before the body is in memory or parsed.

    Smaller bodies stream through. uvicorn reads and drops the rest of a refused body, so that the
    connection can be used again.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The HTTP parser has validated the number. Chunked bodies have no such header.
        content_length = Headers(scope=scope).get("content-length", "0")
        if int(content_length) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        counted = _CountedBody(self.max_bytes, receive, send)
        try:
            await self.app(scope, counted.receive, counted.send)
        except Exception:
            # The application may raise, because it got a disconnect.
            if not counted.is_too_large:
                raise
        if counted.is_too_large and not counted.is_answered:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = JSONResponse(
            error_body(
                f"the body is larger than server.max_body_bytes, {self.max_bytes} bytes",
                "RequestTooLargeError",
                413,
            ),
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )
        await answer(scope, receive, send)


class _CountedBody:
    """Counts the bytes of a body; above the limit, the application gets a disconnect."""

    def __init__(self, max_bytes: int, receive: Receive, send: Send) -> None:
        self.remaining = max_bytes
        self.is_too_large = False
        self.is_answered = False
        self._receive = receive
        self._send = send

    async def receive(self) -> Message:
        if self.is_too_large:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self.remaining -= len(message.get("body", b""))
        if self.remaining < 0:
            self.is_too_large = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.is_too_large and not self.is_answered:
            return  # Drop the answer to an incomplete body.
        self.is_answered = True
        await self._send(message)
