"""vLLM's chat, completion and response handlers with a pruning ratio per request.

vLLM builds its own variants (Anthropic, Cohere) as subclasses of a handler too. A handler gets a
body that vLLM has parsed and validated, so vLLM answers malformed requests itself. It renders the
prompt once for any ``n``, in the task that serves the request, before the response starts. Its
usage is an object, not text.
Middleware would have to parse and write every body a second time. The engine client's
``generate`` does not know the HTTP answer of its request.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from itertools import chain
from typing import Any, Self

from fastapi import Request
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vitcop_server.errors import RequestError
from vitcop_server.fields import (
    PROCESSOR_FIELDS,
    refuse_processor_fields,
    refuse_unbatched_fields,
    refuse_unexplained,
    refuse_unsafe_fields,
)
from vitcop_server.limits import refuse_many_conversations
from vitcop_server.metrics import count_request
from vitcop_server.middleware import EXPLAIN_STATE_KEY
from vitcop_server.ratio import Accepted
from vitcop_server.ratio_serving import RatioServing
from vitcop_server.rendering import ImageRenderer, record_images
from vitcop_server.settings import ServerSettings, server_settings_of
from vitcop_server.tracing import trace_pruning
from vitcop_server.usage import (
    counts_by_modality,
    extend_event,
    extend_usage,
)
from vitcop_vllm.pruning.amount import FixedRatio
from vitcop_vllm.pruning.identity import EXPLAIN_KEY


class _PrunedServing(RatioServing):
    """A mixin for vLLM's handlers that generate.

    Attributes:
        prompt_field: The body field that the handler renders; errors name it.
    """

    prompt_field = "messages"
    renderer_type = ImageRenderer

    @classmethod
    def adopt(cls, *args: Any, **kwargs: Any) -> Self:
        handler = super().adopt(*args, **kwargs)
        handler.online_renderer.prompt_field = cls.prompt_field
        handler.online_renderer.default_ratio = handler.default_ratio
        return handler

    async def _create_pruned(
        self, create: Callable[..., Awaitable[Any]], request: Any, raw_request: Request | None
    ) -> Any:
        """vLLM's answer to ``request`` at its ratio, with the pruning fields in ``usage``."""
        start_ns = time.time_ns()
        try:
            amount, is_raised = self._apply(request, raw_request)
        except RequestError as error:
            return self.refusal(error)
        with record_images() as identifiers:
            answer = await create(request, raw_request)
        if isinstance(answer, ErrorResponse):
            return answer
        counts = counts_by_modality(identifiers)
        images = [*chain.from_iterable(counts.values())]
        fields = self.pruned_model.usage_fields(images, len(counts["video"]))
        effective = fields["pruning_ratio"] or 0.0
        ratio = amount.value if isinstance(amount, FixedRatio) else effective
        count_request(ratio, counts, is_raised)
        if raw_request is not None:
            if (pending := getattr(raw_request.state, EXPLAIN_STATE_KEY, None)) is not None:
                pending.identifiers += identifiers
            if self.is_traced:
                trace_pruning(raw_request, request.request_id, start_ns, amount, fields)
        if isinstance(answer, AsyncGenerator):
            return self._extend_stream(answer, fields)
        extend_usage(answer.usage, fields)
        return answer

    def _apply(self, request: Any, raw_request: Request | None) -> Accepted:
        """Validate how much is dropped, and write it where vLLM passes it to our processor."""
        refuse_processor_fields({name: getattr(request, name, None) for name in PROCESSOR_FIELDS})
        accepted = self.accept(request, raw_request)
        self._refuse_fields(request, server_settings_of(getattr(raw_request, "app", None)))
        request.mm_processor_kwargs = accepted.amount.processor_kwargs()
        pending = getattr(getattr(raw_request, "state", None), EXPLAIN_STATE_KEY, None)
        if pending is not None:
            refuse_unexplained(request.messages)
            request.mm_processor_kwargs[EXPLAIN_KEY] = pending.request_id
        return accepted

    def _refuse_fields(self, request: Any, settings: ServerSettings) -> None:
        refuse_unsafe_fields(request, settings, self.pruned_model.takes_videos)

    def _extend_event(self, event: Any, fields: Mapping[str, Any]) -> Any:
        """An event of a stream; if it has a usage, with ``fields`` in it."""
        return extend_event(event, fields)

    async def _extend_stream(
        self, events: AsyncGenerator[Any, None], fields: Mapping[str, Any]
    ) -> AsyncGenerator[Any, None]:
        # A disconnect closes this generator; vLLM frees the request when its generator closes.
        async with aclosing(events):
            async for event in events:
                yield self._extend_event(event, fields)


class PrunedChat(_PrunedServing, OpenAIServingChat):
    """Handler of ``/v1/chat/completions``."""

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_chat_completion, request, raw_request)


class PrunedChatBatch(_PrunedServing, OpenAIServingChatBatch):
    """Handler of ``/v1/chat/completions/batch``: conversations at one ratio, with one usage."""

    async def create_batch_chat_completion(
        self, request: BatchChatCompletionRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_batch_chat_completion, request, raw_request)

    def _refuse_fields(self, request: Any, settings: ServerSettings) -> None:
        refuse_many_conversations(request.messages)
        refuse_unbatched_fields(request)
        super()._refuse_fields(request, settings)


class _CountTokensRequest(AnthropicCountTokensRequest):
    """vLLM's request with a field for the ratio."""

    mm_processor_kwargs: dict[str, Any] | None = None


class PrunedMessages(PrunedChat, AnthropicServingMessages):
    """Handler of ``/v1/messages``, which vLLM serves as a chat.

    It accepts a ratio in the header or an alias. Anthropic's ``usage`` has no fields for pruning.
    """

    async def count_tokens(
        self, request: AnthropicCountTokensRequest, raw_request: Request | None = None
    ) -> Any:
        try:
            amount = self.accept(request, raw_request).amount
        except RequestError as error:
            return self.refusal(error)
        request = _CountTokensRequest.model_construct(
            **dict(request), mm_processor_kwargs=amount.processor_kwargs()
        )
        return await super().count_tokens(request, raw_request)

    @classmethod
    def to_chat_completion_request(
        cls,
        anthropic_request: AnthropicMessagesRequest | AnthropicCountTokensRequest,
        **kwargs: Any,
    ) -> ChatCompletionRequest:
        chat = super().to_chat_completion_request(anthropic_request, **kwargs)
        chat.mm_processor_kwargs = getattr(anthropic_request, "mm_processor_kwargs", None)
        return chat


class PrunedCompletion(_PrunedServing, OpenAIServingCompletion):
    """Handler of ``/v1/completions``.

    vLLM's completions take text and tokens only, so there is nothing to prune: a ratio is
    validated and returned.
    """

    prompt_field = "prompt"

    async def create_completion(
        self, request: CompletionRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_completion, request, raw_request)


class PrunedResponses(_PrunedServing, OpenAIServingResponses):
    """Handler of ``/v1/responses``."""

    prompt_field = "input"

    async def create_responses(
        self, request: ResponsesRequest, raw_request: Request | None = None
    ) -> Any:
        return await self._create_pruned(super().create_responses, request, raw_request)

    def _refuse_fields(self, request: Any, settings: ServerSettings) -> None:
        """Do nothing: vLLM parses strictly here, and the middleware has checked the body."""

    def _extend_event(self, event: Any, fields: Mapping[str, Any]) -> Any:
        extend_usage(getattr(getattr(event, "response", None), "usage", None), fields)
        return event
