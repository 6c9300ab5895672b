"""Qwen3.5 and 3.6, dense and MoE, whose encoder Stage I prunes. See ``qwen_vl``.

Their hybrid decoders run as in vLLM.
"""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.qwen3_vl import PrunedQwen3ProcessingInfo, PrunedQwen3Processor, Qwen3Tower


class _ImagesInfo(PrunedQwen3ProcessingInfo):
    modalities: tuple[str, ...] = ("image",)  # pruned videos are tested with all three Stages only

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        # Not Qwen3-VL's own, which fails for a model that takes no videos.
        supported: dict[str, set[str]] = super(
            Qwen3VLProcessingInfo, self
        ).get_supported_mm_processor_kwargs()
        return supported


class PrunedQwen35ProcessingInfo(_ImagesInfo, Qwen3_5ProcessingInfo):
    pass


class PrunedQwen35MoeProcessingInfo(_ImagesInfo, Qwen3_5MoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor,
    info=PrunedQwen35ProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class PrunedQwen35ForConditionalGeneration(Qwen3Tower, Qwen3_5ForConditionalGeneration):
    """vLLM's Qwen3.5, which encodes a pruned image's kept tokens only."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor,
    info=PrunedQwen35MoeProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class PrunedQwen35MoeForConditionalGeneration(Qwen3Tower, Qwen3_5MoeForConditionalGeneration):
    """vLLM's Qwen3.5-MoE, which encodes a pruned image's kept tokens only."""
