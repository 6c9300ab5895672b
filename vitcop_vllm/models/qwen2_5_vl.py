"""Qwen2.5-VL with visual token pruning.

The encoder has no [CLS]. Stage I reads the attention that each token receives in the last block,
which attends over the whole image. A visual token is a square of patches, so its query, features
and attention are averages over its patches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.mrope import MRoPEImage, mrope_positions
from vitcop_vllm.models.processing import (
    COUNTS_FIELD,
    PrunedProcessingInfo,
    PrunedProcessor,
    shape_of_row,
    without_pruning_keys,
)
from vitcop_vllm.models.pruned_model import ImageInputs, PrunedModel
from vitcop_vllm.models.stage_one import Groups, ImageShape, Kept, no_embeddings_yet
from vitcop_vllm.models.tensor_parallel import concat_over_ranks, mean_over_ranks
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.views import EncoderView


class PrunedQwenProcessingInfo(PrunedProcessingInfo, Qwen2_5_VLProcessingInfo):
    """Images of any size, scaled to a whole number of visual tokens per side."""

    position_slack = 4  # vLLM's MRotaryEmbedding makes its table 4 times as long

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        kwargs = without_pruning_keys(processor_kwargs or {})
        size, _ = self._get_vision_info(
            image_width=width,
            image_height=height,
            image_processor=self.get_image_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        side = self._token_side()
        box = (0.0, 0.0, float(width), float(height))
        return ImageLayout((Grid(size.height // side, size.width // side),), box)

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        if self.get_max_image_tokens() <= max_tokens:
            return None
        side = isqrt(max_tokens) * self._token_side()
        return side, side

    def _token_side(self) -> int:
        """Side length of a visual token, in pixels."""
        vision: Any = self.get_hf_config().vision_config
        side: int = vision.patch_size * vision.spatial_merge_size
        return side


class PrunedQwenProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""

    def _embedded_shape(self, images: Any, i: int) -> ImageShape:
        _, height, width = images.get(i)["image_grid_thw"].tolist()
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        grid = Grid(height // merge, width // merge)
        return ImageShape(VisualTokenCounts.unpruned(grid.num_tokens), (grid,))


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwenProcessor,
    info=PrunedQwenProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwenForConditionalGeneration(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL. Kept tokens have the rotary positions of the unpruned image."""

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        grids = inputs["image_grid_thw"]
        before, within = (int(part.prod(-1).sum()) for part in (grids[:first], grids[first:end]))
        return {
            "pixel_values": inputs["pixel_values"][before : before + within],
            "image_grid_thw": grids[first:end],
        }

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        tower = self.visual
        pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"].tolist()
        patches = tower.spatial_merge_unit
        images = _images_of(tower, grids)
        metadata = tower.prepare_encoder_metadata(grids)
        # The last block outputs only the kept rows, already in the order of the images' grids. So
        # the tower must not reorder them.
        lengths = [0] * len(images)
        for shape, numbers in groups.items():
            for number in numbers:
                lengths[number] = shape.counts.stages[0]
        metadata["reverse_indices"] = torch.arange(sum(lengths), device=pixels.device)

        def select_rows(last: _LastBlock) -> torch.Tensor:
            kept: Kept = keep(partial(self._view_of, last, pixels, images))
            orders = [image.order for image in images]
            for shape, tokens in kept.items():
                for number, index in zip(groups[shape], tokens.index, strict=True):
                    orders[number] = orders[number][index]
            rows_of = [
                image.first_token + order for image, order in zip(images, orders, strict=True)
            ]
            rows = torch.cat(rows_of)[:, None] * patches
            return (rows + torch.arange(patches, device=rows.device)).flatten()

        with _skip_dropped_rows(tower.blocks[-1], select_rows):
            embedded = tower(pixels, None, encoder_metadata=metadata)
        split = embedded.split(lengths)
        return {
            shape: torch.stack([split[number] for number in numbers])
            for shape, numbers in groups.items()
        }

    def _view_of(
        self,
        last: "_LastBlock",
        pixels: torch.Tensor,
        images: Sequence["_PackedImage"],
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last block on the images ``numbers``."""
        patches = self.visual.spatial_merge_unit
        attention = self.visual.blocks[-1].attn
        ranks = attention.tp_size

        def tokens_of(rows: torch.Tensor, number: int) -> torch.Tensor:
            """(S, ...) rows of all images to (V, P, ...) rows of one image, in grid order."""
            image = images[number]
            first = image.first_token * patches
            image_rows = rows[first : first + image.order.shape[0] * patches]
            return image_rows.unflatten(0, (-1, patches))[image.order]

        def all_tokens(rows: torch.Tensor) -> torch.Tensor:
            return torch.stack([tokens_of(rows, number) for number in numbers])

        firsts = [images[number].first_token * patches for number in numbers]
        length = shape.counts.encoder * patches
        return EncoderView(
            queries=lambda: all_tokens(last.query).float().mean(dim=2),
            keys=all_tokens(last.key).flatten(1, 2),
            cls_query=None,
            to_tokens=lambda of_patches: of_patches.unflatten(1, (-1, patches)).mean(dim=2),
            features=lambda: all_tokens(last.raw_key).float().mean(dim=2),
            scale=attention.attn.scale,
            grids=shape.grids,
            pixels=torch.stack([pixels[first : first + length] for first in firsts]),
            embed=no_embeddings_yet,
            mean_over_ranks=partial(mean_over_ranks, ranks=ranks),
            concat_over_ranks=partial(concat_over_ranks, ranks=ranks),
            kernels=self.kernels,
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        images = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            if feature.data is None or COUNTS_FIELD not in feature.data:
                continue
            row: Any = feature.data[COUNTS_FIELD].data
            counts, (grid,) = shape_of_row(row.tolist())
            place = feature.mm_position
            is_whole = not self.selector.prunes_encoder or not counts.is_pruned
            images.append(MRoPEImage(place.offset, place.length, grid.rows, grid.columns, is_whole))
        if all(image.is_whole for image in images):
            return super().get_mrope_input_positions(input_tokens, mm_features)
        assert len(images) == len(mm_features), "image embeddings cannot be pruned"
        return mrope_positions(len(input_tokens), images)


class _PackedImage(NamedTuple):
    """The rows of an image in the tower.

    Attributes:
        first_token: Index of the image's first visual token in the tower.
        order: (V,) int64, index of each token of the image's grid, counted from ``first_token``.
            The tower computes tokens window by window, so this is a permutation.
    """

    first_token: int
    order: torch.Tensor


def _images_of(tower: Any, grids: Sequence[Sequence[int]]) -> list[_PackedImage]:
    images = []
    sizes = [t * h * w // tower.spatial_merge_unit for t, h, w in grids]
    for grid, first in zip(grids, accumulate(sizes, initial=0), strict=False):
        _, _, window_index, _, _ = tower.get_rope_by_thw(*grid)
        order = tower.invert_permutation(window_index)
        images.append(_PackedImage(first, async_tensor_h2d(order, device=tower.device)))
    return images


class _LastBlock(NamedTuple):
    """Attention inputs of the tower's last block; S patches of all images.

    Attributes:
        query, key: (S, local heads, D), after rotary embedding.
        raw_key: (S, local heads * D), before rotary embedding.
    """

    query: torch.Tensor
    key: torch.Tensor
    raw_key: torch.Tensor


@contextmanager
def _skip_dropped_rows(
    block: Any, select_rows: Callable[[_LastBlock], torch.Tensor]
) -> Iterator[None]:
    """Report a block's attention inputs, then compute the rest of the block for the kept rows only.

    Args:
        block: ``norm1``, ``attn`` (``qkv``, ``attn``, ``proj``), ``norm2`` with the residual, and
            ``mlp``.
        select_rows: Called before attention. Returns the kept rows, (N,) int64 in [0, S). The
            block then outputs these rows, in this order.
    """
    raw_key = rows = torch.empty(0)

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal raw_key
        raw_key = output[0].squeeze(1).chunk(3, dim=-1)[1]

    def before_attention(_: nn.Module, __: object, inputs: Mapping[str, Any]) -> None:
        nonlocal rows
        rows = select_rows(_LastBlock(inputs["query"][0], inputs["key"][0], raw_key))

    def before_proj(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0][rows]

    def before_norm(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        return (inputs[0][rows],), named  # the residual is the output of `proj`: kept rows only

    hooks = (
        block.attn.qkv.register_forward_hook(after_qkv),
        block.attn.attn.register_forward_pre_hook(before_attention, with_kwargs=True),
        block.attn.proj.register_forward_pre_hook(before_proj),
        block.norm2.register_forward_pre_hook(before_norm, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
