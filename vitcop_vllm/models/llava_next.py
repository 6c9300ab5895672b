"""LLaVA-NeXT with visual token pruning; Stage I reads CLIP's [CLS] attention in each tile."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.processing import PrunedProcessor
from vitcop_vllm.models.tiles import TiledModel, TiledProcessingInfo


class PrunedLlavaNextProcessingInfo(TiledProcessingInfo, LlavaNextProcessingInfo):
    """vLLM's data of LLaVA-NeXT, with the grids of an image."""


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=PrunedLlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaNextForConditionalGeneration(TiledModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, which encodes a pruned image's kept tokens only."""

    published_density_scale = 8.0  # the encoder is LLaVA-1.5's
    has_cls = True

    def merge_tiles(
        self, tiles: torch.Tensor, height: int, width: int, row_mark: torch.Tensor
    ) -> torch.Tensor:
        model: Any = SimpleNamespace(config=self.config, image_newline=row_mark)
        merged: torch.Tensor = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            model, torch.tensor([height, width]), tiles, strategy="spatial_unpad"
        )
        return merged
