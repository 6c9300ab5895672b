"""LLaVA-OneVision with visual token pruning, for images.

SigLIP has no [CLS], so Stage I reads the attention that each token receives in its tile. vLLM's
model scales the tiles of large images down, so that a token is an average over four patches.
"""

from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.processing import PrunedProcessor
from vitcop_vllm.models.tiles import TiledModel, TiledProcessingInfo


class PrunedLlavaOnevisionProcessingInfo(TiledProcessingInfo, LlavaOnevisionProcessingInfo):
    """vLLM's data of LLaVA-OneVision, with the grids of an image."""


class PrunedLlavaOnevisionProcessor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=PrunedLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevisionForConditionalGeneration(
    TiledModel, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision, which encodes a pruned image's kept tokens only."""

    has_cls = False

    def merge_tiles(
        self, tiles: torch.Tensor, height: int, width: int, row_mark: torch.Tensor
    ) -> torch.Tensor:
        this: Any = self
        merged: torch.Tensor = this._merge_image_patch_embeddings(
            torch.tensor([height, width]), tiles, image_newline=row_mark, strategy="spatial_unpad"
        )
        return merged
