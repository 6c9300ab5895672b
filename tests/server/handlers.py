"""vLLM's handlers without an engine."""

from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.renderers.online_renderer import OnlineRenderer

from vitcop_server.aliases import AliasedModels
from vitcop_vllm.pruning.settings import PruningSettings


def bare_handler(of: Any) -> Any:
    """A handler of class ``of``. Its model has image token 3; its renderer has no tokenizer."""
    serving, renderer = of.__new__(of), OnlineRenderer.__new__(OnlineRenderer)
    renderer.model_config = SimpleNamespace(hf_config=SimpleNamespace(image_token_index=3))
    renderer.renderer = SimpleNamespace(tokenizer=None)
    serving.online_renderer = renderer
    serving.models = OpenAIServingModels.__new__(OpenAIServingModels)
    serving.models.base_model_paths = [BaseModelPath(name="m", model_path="m")]
    AliasedModels.adopt(serving.models, PruningSettings(), ())
    return serving
