"""Records the images of a request while vLLM renders its prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.renderers.online_renderer import OnlineRenderer

from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.fields import refuse_stray_placeholders
from vitcop_server.usage import image_identifiers

_rendered: ContextVar[list[str] | None] = ContextVar("vitcop_rendered", default=None)
"""Identifiers of the images rendered for the current request.

A context variable, because vLLM's renderer does not get the HTTP request.
"""


@contextmanager
def record_images() -> Iterator[list[str]]:
    """Identifiers of the images that vLLM renders inside the ``with`` block."""
    identifiers: list[str] = []
    token = _rendered.set(identifiers)
    try:
        yield identifiers
    finally:
        _rendered.reset(token)


class ImageRenderer(OnlineRenderer):
    """vLLM's renderer, which also records images and refuses placeholders without an image.

    Handlers call the two methods below once per conversation, in the task that serves the request
    and not in a thread pool. So the context variable is set.

    Attributes:
        prompt_field: The body field that the handler renders; errors name it.
        default_ratio: Counts the requests that are rendered now.
    """

    prompt_field: str
    default_ratio: DefaultRatio

    async def preprocess_chat(self, *args: Any, **kwargs: Any) -> Any:
        with self.default_ratio.rendering():
            conversation, engine_inputs = await super().preprocess_chat(*args, **kwargs)
        self._record(engine_inputs)
        return conversation, engine_inputs

    async def preprocess_completion(self, *args: Any, **kwargs: Any) -> Any:
        with self.default_ratio.rendering():
            engine_inputs = await super().preprocess_completion(*args, **kwargs)
        self._record(engine_inputs)
        return engine_inputs

    def _record(self, engine_inputs: Any) -> None:
        identifiers = _rendered.get()
        if identifiers is not None:  # otherwise no handler reads them
            identifiers += image_identifiers(engine_inputs)
        refuse_stray_placeholders(
            engine_inputs, self.model_config, self.prompt_field, self.renderer.tokenizer
        )
