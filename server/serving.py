"""vLLM's chat and completion handlers, honouring a pruning ratio per request.

Why here: subclassing a serving class is how vLLM builds its own variants (Anthropic, Cohere),
and a handler sees everything at the right moment. The body is already parsed and validated,
once and by vLLM, so malformed requests keep vLLM's answers. ``render_*_request`` returns the
processed prompt itself, before any response is started, in the task that serves the request
(thread pools are below it), once whatever ``n`` is. Usage is still an object here, not text.
The alternatives see less: middleware would parse and write every body a second time, and the
engine client's ``generate`` does not know which HTTP answer it works for.
"""

import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, Self

from fastapi import Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from server.errors import RequestError
from server.fields import PROCESSOR_FIELDS, refuse_processor_fields
from server.middleware import STATE_KEY
from server.ratio import accepted_ratio
from server.usage import PrunedModel, extend_event, picture_counts
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import RATIO_HEADER, RATIO_KEY

_rendered: ContextVar[list[VisualTokenCounts]] = ContextVar("vitcop_rendered")
"""Pictures rendered for the answer being made; vLLM's ``render_*`` gets no raw request."""


class _PrunedServing:
    """What both handlers share; stands before a vLLM serving class."""

    pruned_model: PrunedModel
    create_error_response: Callable[..., ErrorResponse]

    @classmethod
    def adopt(cls, serving: object, pruned_model: PrunedModel) -> Self:
        """``serving`` as an instance of its own subclass.

        vLLM builds its handlers itself and hands them over finished. Building them again would
        need a copy of some twenty constructor arguments that changes with every release.
        """
        adopted: Any = copy.copy(serving)
        adopted.__class__ = cls
        adopted.pruned_model = pruned_model
        return adopted

    async def _create_pruned(
        self, create: Callable[..., Awaitable[Any]], request: Any, raw_request: Request | None
    ) -> Any:
        """vLLM's answer to ``request`` under its ratio, with usage that reports pruning."""
        try:
            ratio = self._take_ratio(request, raw_request)
        except RequestError as error:
            return self.create_error_response(str(error), param=error.param)
        if raw_request is not None:
            setattr(raw_request.state, STATE_KEY, ratio)
        pictures: list[VisualTokenCounts] = []
        token = _rendered.set(pictures)
        try:
            answer = await create(request, raw_request)
        finally:
            _rendered.reset(token)
        if isinstance(answer, ErrorResponse):
            return answer
        fields = self.pruned_model.usage_fields(pictures)
        if isinstance(answer, AsyncGenerator):
            return _extend_stream(answer, fields)
        if answer.usage is not None:
            for name, value in fields.items():
                setattr(answer.usage, name, value)
        return answer

    def _take_ratio(self, request: Any, raw_request: Request | None) -> float:
        """Validate the ratio and write it where vLLM passes it to our processor."""
        refuse_processor_fields({name: getattr(request, name, None) for name in PROCESSOR_FIELDS})
        headers = [] if raw_request is None else raw_request.headers.getlist(RATIO_HEADER)
        body_value = getattr(request, RATIO_KEY, None)
        ratio = accepted_ratio(self.pruned_model.settings, headers, body_value)
        request.mm_processor_kwargs = {RATIO_KEY: ratio}
        return ratio


class PrunedChat(_PrunedServing, OpenAIServingChat):
    """Handler of ``/v1/chat/completions``."""

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_chat_completion, request, raw_request)

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        rendered = await super().render_chat_request(request)
        if not isinstance(rendered, ErrorResponse):
            _conversation, engine_inputs = rendered
            _rendered.get().extend(picture_counts(engine_inputs))
        return rendered


class PrunedCompletion(_PrunedServing, OpenAIServingCompletion):
    """Handler of ``/v1/completions``.

    vLLM's completions take text and tokens only, never pictures: a ratio is validated and
    echoed there, and there is nothing to prune.
    """

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_completion, request, raw_request)

    async def render_completion_request(self, request: CompletionRequest) -> Any:
        rendered = await super().render_completion_request(request)
        if not isinstance(rendered, ErrorResponse):
            _rendered.get().extend(picture_counts(rendered))
        return rendered


async def _extend_stream(
    events: AsyncGenerator[str, None], fields: Mapping[str, Any]
) -> AsyncGenerator[str, None]:
    # A client that leaves closes this generator; vLLM frees the request when its own closes.
    async with aclosing(events):
        async for event in events:
            yield extend_event(event, fields)
