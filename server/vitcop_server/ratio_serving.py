"""The first step of all our handlers: accept the ratio of a request."""

from collections.abc import Callable
from typing import Any, Self

from fastapi import Request
from starlette.datastructures import Headers
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.online_renderer import OnlineRenderer

from vitcop_server.aliases import AliasedModels
from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.errors import RequestError
from vitcop_server.metrics import RATIO_ERRORS
from vitcop_server.middleware import STATE_KEY
from vitcop_server.ratio import Accepted, Asked, accept
from vitcop_server.route_rules import MAX_HEADER, RATIO_PLACES
from vitcop_server.usage import PrunedModel
from vitcop_vllm.adoption import adopt_copy
from vitcop_vllm.pruning.amount import BUDGET_HEADER, BUDGET_KEY
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY


class RatioServing:
    """Accepts the ratio of a request. A mixin for vLLM's serving classes.

    Attributes:
        renderer_type: Class of the handler's renderer.
        pruned_model: The served model's settings, number of layers and names.
        default_ratio: The ratio of requests that name none.
        is_traced: Whether the server exports traces.
    """

    renderer_type: type[OnlineRenderer] = OnlineRenderer
    online_renderer: Any
    pruned_model: PrunedModel
    default_ratio: DefaultRatio
    is_traced: bool
    models: AliasedModels
    create_error_response: Callable[..., ErrorResponse]

    @classmethod
    def adopt(
        cls,
        serving: object,
        pruned_model: PrunedModel,
        default_ratio: DefaultRatio,
        is_traced: bool = False,
    ) -> Self:
        """A copy of ``serving`` as an instance of this class."""
        handler: Self = adopt_copy(serving, cls)
        handler.pruned_model = pruned_model
        handler.default_ratio = default_ratio
        handler.is_traced = is_traced
        renderer = handler.online_renderer = adopt_copy(handler.online_renderer, cls.renderer_type)
        # Only our processor keywords reach this renderer: clients' keywords are refused before.
        # vLLM's own renderer, which other handlers use, still refuses them.
        renderer.trust_request_mm_kwargs = True
        return handler

    def accept(self, request: Any, raw_request: Request | None) -> Accepted:
        """How much of a request's images is dropped. The answer's header repeats it.

        An alias in ``request.model`` becomes the name of the model.

        Raises:
            RequestError: If a value is invalid, or if the request contradicts itself.
        """
        request.model, alias = self.models.split(request.model)
        headers = Headers() if raw_request is None else raw_request.headers
        asked = Asked(
            headers.getlist(RATIO_HEADER),
            getattr(request, RATIO_KEY, None),
            alias,
            headers.getlist(BUDGET_HEADER),
            getattr(request, BUDGET_KEY, None),
            headers.getlist(MAX_HEADER),
        )
        default = self.default_ratio
        accepted = accept(self.pruned_model.settings, asked, default.amount, default.least())
        if raw_request is not None:
            setattr(raw_request.state, STATE_KEY, accepted.amount)
        return accepted

    def refusal(self, error: RequestError) -> ErrorResponse:
        """The answer to a refused request; counts errors of the ratio."""
        RATIO_ERRORS.inc(error.param in RATIO_PLACES)
        return self.create_error_response(str(error), param=error.param)
