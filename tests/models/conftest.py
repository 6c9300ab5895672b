"""Processors of tiny checkpoints."""

from typing import Any

import pytest

from tests.families.family import Saved


@pytest.fixture(scope="package")
def processor_of(checkpoint_of: Any) -> Any:
    """A family, the operator's keywords and changes of the model's configuration -> the tiny
    checkpoint's processor."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    def processor_of(family: Saved, processor_kwargs: dict[str, Any], **overrides: Any) -> Any:
        load_general_plugins()
        options = EngineArgs(
            model=str(checkpoint_of(family)),
            max_model_len=1024,
            mm_processor_kwargs=processor_kwargs,
            trust_remote_code=True,
            hf_overrides=overrides,
        )
        config = options.create_engine_config().model_config
        return MULTIMODAL_REGISTRY.create_processor(config)

    return processor_of
