"""Gemma 3, whose encoder Stage I prunes; its decoder runs as in vLLM.

SigLIP has no [CLS], so Stage I reads the attention that each token receives. A visual token is an
average over a square of patches, so its attention and features are too.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.clip_rows import KeptRows, LayerParts, skip_dropped_rows
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.processing import (
    PrunedProcessingInfo,
    PrunedProcessor,
    without_pruning_keys,
)
from vitcop_vllm.models.pruned_encoder import ImageInputs, PrunedEncoder
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    gather_rows,
    select_items,
)
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.views import EncoderView


class PrunedGemma3ProcessingInfo(PrunedProcessingInfo, Gemma3ProcessingInfo):
    """Images of any size, all scaled to one grid."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        """The grid of an image, which the encoder sees whole.

        Raises:
            ValueError: If the image would be encoded in crops too.
        """
        kwargs = without_pruning_keys(processor_kwargs or {})
        processor = self.get_hf_processor(**kwargs)
        crops = self.get_num_crops(
            image_width=width, image_height=height, processor=processor, mm_kwargs=kwargs
        )
        if crops:
            raise ValueError(
                "an image in crops has text between its visual tokens, and pruning needs them in "
                "one run: set do_pan_and_scan to false"
            )
        side = round(processor.image_seq_length**0.5)
        return ImageLayout((Grid(side, side),), (0.0, 0.0, float(width), float(height)))

    def get_max_image_tokens(self) -> int:
        tokens: int = self.get_hf_processor().image_seq_length
        return tokens


class PrunedGemma3Processor(PrunedProcessor, Gemma3MultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGemma3Processor,
    info=PrunedGemma3ProcessingInfo,
    dummy_inputs=Gemma3DummyInputsBuilder,
)
class PrunedGemma3ForConditionalGeneration(PrunedEncoder, Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3, which encodes a pruned image's kept tokens only."""

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        return {name: inputs[name][first:end] for name in ("pixel_values", "num_patches")}

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        pixels = inputs["pixel_values"]
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        patches = async_tensor_h2d(self._patches_of_tokens, device=pixels.device)
        kept: Kept = {}

        def select_rows(query: torch.Tensor, key: torch.Tensor) -> KeptRows:
            nonlocal kept
            kept = keep(partial(self._view_of, layer.self_attn, patches, query, key, pixels))
            rows = []
            for shape, numbers in groups.items():
                images = async_tensor_h2d(torch.tensor(numbers), device=pixels.device)
                of_image = patches[kept[shape].index] if shape in kept else patches[None]
                rows.append((images[:, None, None] * query.shape[1] + of_image).flatten())
            return KeptRows(None, None, torch.cat(rows))

        with skip_dropped_rows(LayerParts.of_clip(layer), select_rows):
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        # Of all tokens, because the projector averages over the whole grid. It is one small GEMM.
        projected = self.multi_modal_projector(features)
        embedded = {}
        for shape, numbers in groups.items():
            rows = select_items(projected, numbers)
            embedded[shape] = gather_rows(rows, kept[shape].index) if shape in kept else rows
        return embedded

    @cached_property
    def _patches_of_tokens(self) -> torch.Tensor:
        """(V, P) int64: the P patches that each visual token is an average of."""
        projector = self.multi_modal_projector
        side, square = projector.patches_per_image, projector.kernel_size
        patches = torch.arange(side**2).view(1, 1, side, side).float()
        return torch.nn.functional.unfold(patches, square, stride=square)[0].T.long()

    def _view_of(
        self,
        attention: Any,
        patches: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        pixels: torch.Tensor,
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last layer on the images ``numbers``.

        Args:
            attention: Attention module of that layer.
            patches: (V, P), as :attr:`_patches_of_tokens`, on the device.
            query, key: (B, T, local heads * D) of all images.
            pixels: (B, 3, height, width) of all images.
            shape: Shape of the images ``numbers``.
            numbers: Indices among the B images.
        """
        query, key = (
            select_items(x, numbers).unflatten(-1, (-1, attention.head_dim)) for x in (query, key)
        )
        return self.view_of_layer(
            attention.tp_size,
            # As in Qwen's towers: a token's query is the mean over its patches.
            queries=lambda: query[:, patches].float().mean(dim=2),
            keys=key,
            cls_query=None,
            to_tokens=lambda of_patches: of_patches[:, patches].mean(dim=2),
            features=lambda: key[:, patches].flatten(3).float().mean(dim=2),
            scale=attention.scale,
            grids=shape.grids,
            pixels=select_items(pixels, numbers),
        )
