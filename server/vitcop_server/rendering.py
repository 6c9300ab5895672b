"""The images of a request, taken down while vLLM renders its prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.renderers.online_renderer import OnlineRenderer

from vitcop_server.fields import refuse_stray_placeholders
from vitcop_server.usage import image_names

_rendered: ContextVar[list[str] | None] = ContextVar("vitcop_rendered", default=None)
"""Names of the images rendered for the answer being made, if one is: vLLM's renderer gets no
raw request."""


@contextmanager
def record_images() -> Iterator[list[str]]:
    """Names of the images that are rendered inside."""
    names: list[str] = []
    token = _rendered.set(names)
    try:
        yield names
    finally:
        _rendered.reset(token)


class ImageRenderer(OnlineRenderer):
    """vLLM's renderer, which names images to :func:`record_images` and refuses marks of none.

    All handlers render through the two methods below, one conversation at a time, in the task
    that serves the request (thread pools are below them).

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
        if names is not None:  # else nobody waits for what becomes of them
            names += image_names(engine_inputs)
        refuse_stray_placeholders(
            engine_inputs, self.model_config, self.prompt_field, self.renderer.tokenizer
        )
