"""Records the images of a request while vLLM renders its prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.renderers.online_renderer import OnlineRenderer

from vitcop_server.fields import refuse_stray_placeholders
from vitcop_server.usage import image_names

_rendered: ContextVar[list[str] | None] = ContextVar("vitcop_rendered", default=None)
"""Identifiers of the images rendered for the current request. A context variable, because vLLM's
renderer does not get the HTTP request."""


@contextmanager
def record_images() -> Iterator[list[str]]:
    """Identifiers of the images that vLLM renders inside the ``with`` block."""
    names: list[str] = []
    token = _rendered.set(names)
    try:
        yield names
    finally:
        _rendered.reset(token)


class ImageRenderer(OnlineRenderer):
    """vLLM's renderer, which also records images and refuses placeholders without an image.

    All handlers call the two methods below, per conversation, in the task that serves the request.
    Thread pools are further down.

    Attributes:
        prompt_field: The body field that a handler renders, for errors.
    """

    prompt_field: str

    async def preprocess_chat(self, *args: Any, **kwargs: Any) -> Any:
        conversation, engine_inputs = await super().preprocess_chat(*args, **kwargs)
        self._record(engine_inputs)
        return conversation, engine_inputs

    async def preprocess_completion(self, *args: Any, **kwargs: Any) -> Any:
        engine_inputs = await super().preprocess_completion(*args, **kwargs)
        self._record(engine_inputs)
        return engine_inputs

    def _record(self, engine_inputs: Any) -> None:
        names = _rendered.get()
        if names is not None:  # otherwise no handler reads them
            names += image_names(engine_inputs)
        refuse_stray_placeholders(
            engine_inputs, self.model_config, self.prompt_field, self.renderer.tokenizer
        )
