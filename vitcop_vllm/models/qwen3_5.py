"""Qwen3.5, whose encoder Stage I prunes; its hybrid decoder runs as in vLLM. See ``qwen_vl``."""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.qwen3_vl import PrunedQwen3ProcessingInfo, PrunedQwen3Processor, Qwen3Tower


class PrunedQwen35ProcessingInfo(PrunedQwen3ProcessingInfo, Qwen3_5ProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3Processor,
    info=PrunedQwen35ProcessingInfo,
    dummy_inputs=Qwen3VLDummyInputsBuilder,
)
class PrunedQwen35ForConditionalGeneration(Qwen3Tower, Qwen3_5ForConditionalGeneration):
    """vLLM's Qwen3.5, which encodes a pruned image's kept tokens only."""
