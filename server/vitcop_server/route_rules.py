"""The table of routes: where each one accepts a pruning ratio, and its protocol."""

import re
from dataclasses import dataclass, replace

from starlette.types import Scope

from vitcop_vllm.pruning.amount import BUDGET_HEADER, BUDGET_KEY
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

MODEL_KEY = "model"
"""Body field whose value may carry a ratio: see :mod:`vitcop_server.aliases`."""

MAX_HEADER = "X-Pruning-Max"
"""Request header with the largest ratio that the request may get."""

EXPLAIN_ROUTE = "/v1/pruning/explain"

RATIO_PLACES = frozenset(
    {RATIO_HEADER, BUDGET_HEADER, MAX_HEADER, RATIO_KEY, BUDGET_KEY, MODEL_KEY}
)
"""Headers and body fields with a ratio or a budget, or with a limit of it."""


@dataclass(frozen=True)
class RouteRules:
    """How one POST route handles a pruning ratio. The defaults are for unknown routes.

    Attributes:
        ratio_places: Where the route accepts a ratio: header, body field, or the model's name; and
            the header with the largest ratio. In any other place either is refused, because vLLM
            would ignore it.
        is_body_read: Whether our middleware reads the body before vLLM does. The handlers of chats
            and completions check their requests themselves: their bodies hold large images, and
            parsing those twice would be slow.
        is_model_dropped: Whether vLLM drops the body's ``model`` before a handler sees it.
        is_inference: False for routes where a ratio has no meaning. They ignore it, because clients
            send their default headers to every route.
        is_anthropic: Whether errors have Anthropic's format, with OpenAI's fields inside.
    """

    ratio_places: frozenset[str] = frozenset()
    is_body_read: bool = True
    is_model_dropped: bool = False
    is_inference: bool = True
    is_anthropic: bool = False

    @property
    def advice(self) -> str:
        """How to send a ratio, as the end of a sentence."""
        if RATIO_HEADER not in self.ratio_places:
            return "send it to /v1/chat/completions, /v1/completions or /v1/responses"
        if RATIO_KEY not in self.ratio_places:
            return f"send header {RATIO_HEADER}"
        return f"send header {RATIO_HEADER} or body field {RATIO_KEY}"


CHAT_RULES = RouteRules(RATIO_PLACES, is_body_read=False)

_UNKNOWN = RouteRules()
_UNKNOWN_ANTHROPIC = RouteRules(is_anthropic=True)
# Anthropic's protocol allows no additional body fields.
_MESSAGES = replace(
    _UNKNOWN_ANTHROPIC, ratio_places=frozenset({RATIO_HEADER, BUDGET_HEADER, MAX_HEADER, MODEL_KEY})
)
# Text or tokens only: there is nothing to prune, so an alias means the model itself, and any limit
# is kept.
_TEXT = RouteRules(frozenset({MAX_HEADER, MODEL_KEY}))
_NOT_INFERENCE = RouteRules(is_inference=False)

ROUTES = {
    "/v1/chat/completions": CHAT_RULES,
    "/v1/chat/completions/batch": CHAT_RULES,
    "/v1/completions": CHAT_RULES,
    EXPLAIN_ROUTE: CHAT_RULES,
    "/v1/responses": RouteRules(RATIO_PLACES),
    # vLLM's SageMaker layer replaces the model by the adapter that a header names.
    "/invocations": RouteRules(RATIO_PLACES, is_model_dropped=True),
    "/tokenize": RouteRules(RATIO_PLACES),
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/detokenize": _TEXT,
    "/generative_scoring": _TEXT,
    "/v1/decisions": _TEXT,
    "/v1/chat/completions/derender": _TEXT,
    "/v1/completions/derender": _TEXT,
    "/v1/completions/render": _TEXT,
    "/ping": _NOT_INFERENCE,
    "/start_profile": _NOT_INFERENCE,
    "/stop_profile": _NOT_INFERENCE,
}

_ANTHROPIC = re.compile(r"/v1/messages(/.*)?")
_CANCEL = re.compile(r"/v1/responses/[^/]+/cancel")


def rules_of(scope: Scope) -> RouteRules:
    """The rules for the route of an HTTP request."""
    path = route_path(scope)
    if path in ROUTES:
        return ROUTES[path]
    if _CANCEL.fullmatch(path):
        return _NOT_INFERENCE
    return _UNKNOWN_ANTHROPIC if _ANTHROPIC.fullmatch(path) else _UNKNOWN


def route_path(scope: Scope) -> str:
    """A request's path without the prefix of a proxy."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
