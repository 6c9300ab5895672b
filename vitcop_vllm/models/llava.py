"""LLaVA-1.5 with visual token pruning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.clip_rows import KeptRows, LayerParts, kept_rows, skip_dropped_rows
from vitcop_vllm.models.llava_processor import (
    PrunedLlavaMultiModalProcessor,
    PrunedLlavaProcessingInfo,
)
from vitcop_vllm.models.pruned_encoder import ImageInputs
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    gather_rows,
    select_items,
)
from vitcop_vllm.pruning.views import EncoderView


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaMultiModalProcessor,
    info=PrunedLlavaProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5; Stage I reads the attention of CLIP's [CLS]."""

    published_density_scale = 8.0

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        return {"pixel_values": inputs["pixel_values"][first:end]}

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        pixels = inputs["pixel_values"]
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        kept: Kept = {}

        def select_rows(query: torch.Tensor, key: torch.Tensor) -> KeptRows:
            nonlocal kept
            kept = keep(partial(self._view_of, layer.self_attn, query, key, pixels))
            return kept_rows(groups, kept, query.device)

        with skip_dropped_rows(LayerParts.of_clip(layer), select_rows):
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        embedded = {}
        for shape, numbers in groups.items():
            rows = select_items(features, numbers)
            if shape in kept:
                rows = gather_rows(rows, kept[shape].index)
            embedded[shape] = self.multi_modal_projector(rows)
        return embedded

    def _view_of(
        self,
        attention: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        pixels: torch.Tensor,
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last layer on the images ``numbers``.

        Args:
            attention: Attention module of that layer.
            query, key: (B, 1 + V, local heads * D) of all images, [CLS] first.
            pixels: (B, 3, height, width) of all images.
            shape: Shape of the images ``numbers``.
            numbers: Indices among the B images.
        """
        query, key = (x.unflatten(-1, (-1, attention.head_dim)) for x in (query, key))
        keys = select_items(key, numbers)
        return self.view_of_layer(
            attention.tp_size,
            queries=lambda: select_items(query, numbers),
            keys=keys,
            cls_query=select_items(query[:, 0], numbers),
            to_tokens=lambda of_patches: of_patches,
            features=lambda: keys[:, 1:].flatten(2),
            scale=attention.scale,
            grids=shape.grids,
            pixels=select_items(pixels, numbers),
        )
