"""Middleware of all routes: adds the ratio to answers, refuses ratios that vLLM would ignore."""

import json
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitcop_server.aliases import ratio_in_name
from vitcop_server.errors import RequestError
from vitcop_server.fields import refuse_processor_fields, refuse_unsafe_body
from vitcop_server.metrics import RATIO_ERRORS
from vitcop_server.route_rules import (
    MAX_HEADER,
    MODEL_KEY,
    RATIO_PLACES,
    RouteRules,
    route_path,
    rules_of,
)
from vitcop_server.settings import server_settings_of
from vitcop_vllm.pruning.amount import BUDGET_HEADER, BUDGET_KEY, Amount
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

STATE_KEY = "pruning_amount"
"""Key of the accepted :class:`Amount` in a request's state; its handler sets it."""

EXPLAIN_STATE_KEY = "pruning_explained"
"""Key of an explanation's state in a request's state; only ``/v1/pruning/explain`` sets it."""

_TOKENS_PREFIX = "/inference/"


class PruningMiddleware:
    """Adds the accepted ratio to the answer; refuses a ratio on routes that do not accept it.

    Streams pass through unbuffered. If :class:`~vitcop_server.route_rules.RouteRules` say so, the
    middleware reads, checks and replays the body, because vLLM would silently drop an unknown
    header or field on that route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        rules = rules_of(scope)
        if not rules.is_inference:
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def send_with_ratio(message: Message) -> None:
            if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
                amount = state.get(STATE_KEY)
                if amount is not None:
                    MutableHeaders(scope=message)[amount.header] = str(amount)
            await send(message)

        if rules.is_body_read:
            await self._check_body(rules, scope, receive, send_with_ratio)
        else:
            await self.app(scope, receive, send_with_ratio)

    async def _check_body(
        self, rules: RouteRules, scope: Scope, receive: Receive, send: Send
    ) -> None:
        # Read the whole body even if the header is already wrong: an unread body closes the
        # client's connection.
        messages = await _read_body(receive)
        headers = Headers(scope=scope)
        try:
            body = _json_object(messages)
            ratio = ratio_in_name(scope["app"], body.get(MODEL_KEY))
            _refuse_misplaced_ratios(rules, headers, body, ratio)
            refuse_processor_fields(body, rules)
            _refuse_features(route_path(scope), body)
            refuse_unsafe_body(body, server_settings_of(scope["app"]), rules)
        except RequestError as error:
            RATIO_ERRORS.inc(error.param in RATIO_PLACES)
            await JSONResponse(error.body(), status_code=400)(scope, receive, send)
            return
        has_other_ratio = any(name in headers for name in (RATIO_HEADER, BUDGET_HEADER)) or any(
            body.get(key) is not None for key in (RATIO_KEY, BUDGET_KEY)
        )
        if rules.is_model_dropped and ratio is not None and not has_other_ratio:
            header = (RATIO_HEADER.lower().encode(), str(ratio).encode())
            scope = {**scope, "headers": [*scope["headers"], header]}

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


def _refuse_misplaced_ratios(
    rules: RouteRules, headers: Headers, body: Mapping[str, object], ratio_of_name: Amount | None
) -> None:
    for place, name, is_present in (
        (RATIO_HEADER, RATIO_HEADER, RATIO_HEADER in headers),
        (BUDGET_HEADER, BUDGET_HEADER, BUDGET_HEADER in headers),
        (MAX_HEADER, MAX_HEADER, MAX_HEADER in headers),
        (BUDGET_KEY, BUDGET_KEY, body.get(BUDGET_KEY) is not None),
        (RATIO_KEY, RATIO_KEY, body.get(RATIO_KEY) is not None),
        (MODEL_KEY, f"the ratio in model {body.get(MODEL_KEY)!r}", ratio_of_name is not None),
    ):
        if is_present and place not in rules.ratio_places:
            raise RequestError(
                f"{name} is not supported on this route: {rules.advice}", param=place
            )


def _refuse_features(path: str, body: Mapping[str, object]) -> None:
    if path.startswith(_TOKENS_PREFIX) and body.get("features") is not None:
        # Identifiers carry the counts that workers plan with: a forged identifier could stop
        # the engine for all clients.
        raise RequestError(
            "features of images processed elsewhere are not accepted: send the images",
            param="features",
        )


async def _read_body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _json_object(messages: list[Message]) -> Mapping[str, object]:
    """The body as a JSON object; empty if it is none, so that vLLM answers it."""
    try:
        # json.loads detects the encoding of bytes, as the route's own parser does.
        body = json.loads(b"".join(message.get("body", b"") for message in messages))
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
