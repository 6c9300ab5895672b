"""Mistral3, whose encoder Stage I prunes; its decoder runs as in vLLM.

Pixtral's encoder has no [CLS], so Stage I reads the attention that each token receives. A visual
token is a square of patches, so its attention and features are averages over them.

The prompt has a mark after each row of visual tokens. Only the device knows how many tokens of a
row are kept, so a pruned image has the last mark only, which ends the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.mistral3 import (
    Mistral3DummyInputsBuilder,
    Mistral3ForConditionalGeneration,
    Mistral3MultiModalProcessor,
    Mistral3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.packed_tower import (
    AttentionInputs,
    PackedImage,
    SelectRows,
    kept_places,
    lengths_of_images,
    split_by_shape,
)
from vitcop_vllm.models.processing import (
    PrunedProcessingInfo,
    PrunedProcessor,
    without_pruning_keys,
)
from vitcop_vllm.models.pruned_encoder import ImageInputs, PrunedEncoder
from vitcop_vllm.models.stage_one import Groups, ImageShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.views import EncoderView


class PrunedMistral3ProcessingInfo(PrunedProcessingInfo, Mistral3ProcessingInfo):
    """Images of any size, scaled to a whole number of visual tokens per side."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        encoder = self.get_vision_encoder_info(without_pruning_keys(processor_kwargs or {}))
        columns, rows = encoder.get_patch_grid_size(image_width=width, image_height=height)
        return ImageLayout((Grid(rows, columns),), (0.0, 0.0, float(width), float(height)))

    def get_max_image_tokens(self) -> int:
        largest = self.get_image_size_with_most_features()
        tokens: int = self.get_num_image_tokens(
            image_width=largest.width, image_height=largest.height
        )
        return tokens


class PrunedMistral3Processor(PrunedProcessor, Mistral3MultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMistral3Processor,
    info=PrunedMistral3ProcessingInfo,
    dummy_inputs=Mistral3DummyInputsBuilder,
)
class PrunedMistral3ForConditionalGeneration(PrunedEncoder, Mistral3ForConditionalGeneration):
    """vLLM's Mistral3, which encodes a pruned image's kept tokens only."""

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        return {"pixel_values": inputs["pixel_values"][first:end]}

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        pixels: Any = inputs["pixel_values"]  # a tensor, or a list if sizes differ
        layer = self.vision_tower.transformer.layers[-1]
        shapes = {number: shape for shape, numbers in groups.items() for number in numbers}
        grids = [shapes[number].grids[0] for number in range(len(shapes))]

        def select_rows(last: AttentionInputs) -> torch.Tensor:
            images = self._packed(grids, last.query.device)
            kept = keep(partial(self._view_of, last, pixels, images))
            # As the patches of one image, whose tokens are the kept ones in a single row.
            return kept_places(images, groups, kept).transpose(0, 1).flatten()

        with layer_of_kept_rows(layer, select_rows) as outputs:
            self.vision_tower(pixels)
        merge, patch = self.config.spatial_merge_size, self.config.vision_config.patch_size
        size = merge * patch, sum(lengths_of_images(groups)) * merge * patch
        return split_by_shape(self.multi_modal_projector(outputs[0], [size]), groups)

    def _packed(self, grids: Sequence[Grid], device: torch.device) -> list[PackedImage]:
        """Their places are rows of patches, (V, merge, merge)."""
        merge = self.config.spatial_merge_size
        firsts = accumulate((grid.num_tokens * merge**2 for grid in grids), initial=0)
        images = []
        for grid, first in zip(grids, firsts, strict=False):
            patches = torch.arange(grid.num_tokens * merge**2, device=device)
            squares = patches.view(grid.rows, merge, grid.columns, merge).transpose(1, 2)
            images.append(PackedImage(first, squares.reshape(-1, merge, merge)))
        return images

    def _view_of(
        self,
        last: AttentionInputs,
        pixels: Sequence[torch.Tensor],
        images: Sequence[PackedImage],
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last layer on the images ``numbers``."""
        attention = self.vision_tower.transformer.layers[-1].attention
        patches = images[numbers[0]].places.flatten(1)

        def rows_of(rows: torch.Tensor) -> torch.Tensor:
            """(S, ...) rows of all images to (B, T, ...) of these."""
            firsts = [images[number].first for number in numbers]
            return torch.stack([rows[first : first + patches.numel()] for first in firsts])

        return self.view_of_layer(
            attention.tp_size,
            queries=lambda: rows_of(last.query)[:, patches].float().mean(dim=2),
            keys=rows_of(last.key),
            cls_query=None,
            to_tokens=lambda of_patches: of_patches[:, patches].mean(dim=2),
            features=lambda: rows_of(last.raw_key)[:, patches].float().mean(dim=2),
            scale=attention.attn.scale,
            grids=shape.grids,
            pixels=torch.stack([pixels[number] for number in numbers]),
        )


@contextmanager
def layer_of_kept_rows(layer: Any, select_rows: SelectRows) -> Iterator[list[torch.Tensor]]:
    """Report a layer's attention inputs, then compute the rest of it for kept rows only.

    Args:
        layer: vLLM's ``PixtralHFTransformerBlock``. Its own output is then its input.
        select_rows: Called before attention.

    Yields:
        A list that then holds the (N, C) output of these rows, in their order.
    """
    attention = layer.attention
    raw_key = rows = torch.empty(0)
    outputs: list[torch.Tensor] = []

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal raw_key
        raw_key = output[0][0].chunk(3, dim=-1)[1]

    def before_attention(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows = select_rows(AttentionInputs(inputs[0][0], inputs[1][0], raw_key))

    def before_projection(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0][:, rows]

    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *packing: Any) -> Any:
        # As the layer's own forward, which adds attention to all rows.
        attended, _ = attention(layer.attention_norm(x), (cos, sin), *packing)
        kept = x[:, rows] + attended
        outputs.append((kept + layer.feed_forward(layer.ffn_norm(kept)))[0])
        return x

    hooks = (
        attention.qkv_proj.register_forward_hook(after_qkv),
        attention.attn.register_forward_pre_hook(before_attention),
        attention.o_proj.register_forward_pre_hook(before_projection),
    )
    layer.forward = forward
    try:
        yield outputs
    finally:
        del layer.forward
        for hook in hooks:
            hook.remove()
