"""An engine as if it had started with ``compare_frames``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


@contextmanager
def comparing_frames(llm: "LLM", compares: bool = True) -> Iterator[None]:
    """Change the setting where processor and model read it."""
    engine: Any = llm.llm_engine
    model = engine.model_executor.driver_worker.worker.model_runner.model
    info = engine.renderer.mm_processor.info
    before = model.pruning
    assert info.settings == before
    settings = before.model_copy(update={"compare_frames": compares})
    model.pruning = vars(info)["settings"] = settings
    engine.reset_encoder_cache()
    try:
        yield
    finally:
        model.pruning = vars(info)["settings"] = before
        engine.reset_encoder_cache()
