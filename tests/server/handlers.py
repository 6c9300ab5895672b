"""vLLM's handlers, as they are without an engine."""

from types import SimpleNamespace
from typing import Any

from vllm.renderers.online_renderer import OnlineRenderer


def bare_handler(of: Any) -> Any:
    """A handler of class ``of`` that has a renderer, of a model whose picture token is 3."""
    serving, renderer = of.__new__(of), OnlineRenderer.__new__(OnlineRenderer)
    renderer.model_config = SimpleNamespace(hf_config=SimpleNamespace(image_token_index=3))
    serving.online_renderer = renderer
    return serving
