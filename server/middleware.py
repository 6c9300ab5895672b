"""Around every route: the ratio told in the answer, and never ignored where it is unknown."""

import json
import re
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import RequestError
from server.fields import refuse_processor_fields, refuse_unsafe_body
from server.metrics import RATIO_ERRORS
from server.ratio import ratio_text
from server.settings import settings_of
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

EXPLAIN_ROUTE = "/v1/pruning/explain"
PRUNED_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        EXPLAIN_ROUTE,
    }
)
READ_ROUTES = {
    "/v1/messages": frozenset({RATIO_HEADER}),
    "/v1/responses": frozenset({RATIO_HEADER, RATIO_KEY}),
}
"""Pruned routes whose bodies are looked into here, before vLLM reads them, each with where its
ratio may stand: the protocol of messages has no room for fields of ours."""

STATE_KEY = "pruning_ratio"
"""Key in a request's state where its handler leaves the accepted ratio."""

EXPLAIN_STATE_KEY = "pruning_explained"
"""Key in a request's state of what its explanation needs; absent from all other requests."""

_NOT_INFERENCE = frozenset({"/ping", "/start_profile", "/stop_profile"})
"""POST routes that clients with default headers call beside inference: nothing to prune."""

_CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")
"""The same, of an answer that is made in the background."""

_TOKENS_PREFIX = "/inference/"


class PruningMiddleware:
    """Tells the accepted ratio on the pruned routes and refuses it on all others.

    Pure ASGI, so that streams pass through unbuffered. On :data:`PRUNED_ROUTES` the body is not
    touched. On other POST routes it is read, looked into and replayed: vLLM would drop an
    unknown header or field there without a word.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        path = _path(scope)
        if path in PRUNED_ROUTES:
            await self._tell_ratio(self.app, scope, receive, send)
        elif path in READ_ROUTES:
            await self._tell_ratio(self._refuse_ratio, scope, receive, send)
        elif path in _NOT_INFERENCE or _CANCEL.fullmatch(path):
            await self.app(scope, receive, send)
        else:
            await self._refuse_ratio(scope, receive, send)

    async def _tell_ratio(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def send_with_ratio(message: Message) -> None:
            if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
                ratio = state.get(STATE_KEY)
                if ratio is not None:
                    MutableHeaders(scope=message)[RATIO_HEADER] = ratio_text(ratio)
            await send(message)

        await app(scope, receive, send_with_ratio)

    async def _refuse_ratio(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        # Read to the end even when the header alone decides: an unread body would cost the
        # client its connection.
        messages = await _read_body(receive)
        try:
            body = _json_object(messages)
            _check_unpruned(path, Headers(scope=scope), body)
            refuse_unsafe_body(body, settings_of(scope["app"]))
        except RequestError as error:
            RATIO_ERRORS.inc(error.param in (RATIO_HEADER, RATIO_KEY))
            await JSONResponse(error.body(), status_code=400)(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _check_unpruned(path: str, headers: Headers, body: Mapping[str, object]) -> None:
    accepted = READ_ROUTES.get(path, frozenset())
    for param, present in (
        (RATIO_HEADER, RATIO_HEADER in headers),
        (RATIO_KEY, body.get(RATIO_KEY) is not None),
    ):
        if present and param not in accepted:
            raise RequestError(
                f"{param} is not supported on this route: "
                + (
                    f"send header {RATIO_HEADER}"
                    if accepted
                    else "send it to /v1/chat/completions, /v1/completions or /v1/responses"
                ),
                param=param,
            )
    refuse_processor_fields(body)
    if path.startswith(_TOKENS_PREFIX) and body.get("features") is not None:
        # Their identities carry the counts that workers plan with: a made-up one could stop
        # the engine for everyone.
        raise RequestError(
            "features of pictures processed elsewhere are not accepted: send the pictures",
            param="features",
        )


async def _read_body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _json_object(messages: list[Message]) -> Mapping[str, object]:
    """The body as a JSON object; empty where it is none, for vLLM to answer."""
    try:
        # From bytes, so that the encoding is detected just as the route's own parser does.
        body = json.loads(b"".join(message.get("body", b"") for message in messages))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
