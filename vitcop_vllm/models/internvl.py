"""InternVL with visual token pruning, for images; both forms of its checkpoints.

The encoder gets an image in square tiles, row by row, and as a thumbnail after them if there are
several. Pixel shuffle joins the patches of a square, by default 2x2, to a visual token, so a
token's saliency and features are averages over its patches.

An image has a grid for all tiles and a grid for the thumbnail. The prompt has the tokens tile by
tile, so the number of a token in its grids is not its number in the prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.internvl.processing_internvl import InternVLProcessorKwargs
from vllm.config import VllmConfig
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processors.internvl import calculate_internvl_targets
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.clip_rows import KeptRows, LayerParts, skip_dropped_rows
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.processing import (
    PrunedProcessingInfo,
    PrunedProcessor,
    without_pruning_keys,
)
from vitcop_vllm.models.pruned_encoder import ImageInputs
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    select_items,
)
from vitcop_vllm.pruning.grids import Grid, Grids
from vitcop_vllm.pruning.views import EncoderView


class Tiling(NamedTuple):
    """How the processor cuts an image.

    Attributes:
        rows, columns: Tiles that cover the image, which is stretched to fit.
        has_thumbnail: Whether the whole image follows as one more tile.
        tile: Height and width of a tile, in pixels.
        side: Visual tokens along a side of a tile.
    """

    rows: int
    columns: int
    has_thumbnail: bool
    tile: int
    side: int

    @property
    def grids(self) -> Grids:
        tiles = Grid(self.rows * self.side, self.columns * self.side)
        return (tiles, Grid(self.side, self.side)) if self.has_thumbnail else (tiles,)


class InternTilingInfo(PrunedProcessingInfo):
    """A grid for all tiles of an image, then a grid for its thumbnail."""

    def tiling(self, width: int, height: int, processor_kwargs: Mapping[str, object]) -> Tiling:
        """How an image of this size is cut, with the request's keywords for vLLM's processor."""
        raise NotImplementedError

    def target_ratios(self) -> Iterable[tuple[int, int]]:
        """Columns and rows of tiles that an image may be cut into."""
        raise NotImplementedError

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        tiling = self.tiling(width, height, without_pruning_keys(processor_kwargs or {}))
        return ImageLayout(tiling.grids, (0.0, 0.0, float(width), float(height)))

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        this: Any = self
        if this.get_max_image_tokens() <= max_tokens:
            return None
        tile = self.tiling(1, 1, {}).tile
        sizes = {}
        for columns, rows in self.target_ratios():
            size = tile * columns, tile * rows
            sizes[self.layout(*size).num_tokens] = size
        return sizes[max((n for n in sizes if n <= max_tokens), default=min(sizes))]


class PrunedInternVLProcessingInfo(InternTilingInfo, InternVLProcessingInfo):
    """vLLM's data of InternVLChatModel, with the grids of an image."""

    def tiling(self, width: int, height: int, processor_kwargs: Mapping[str, object]) -> Tiling:
        processor = self.get_hf_processor(**processor_kwargs)
        images = processor.image_processor
        num_tiles, wide, tall = calculate_internvl_targets(
            orig_width=width,
            orig_height=height,
            target_ratios=processor.resolve_target_ratios(use_thumbnail=False),
            image_size=images.image_size,
            use_thumbnail=images.use_thumbnail,
        )
        rows, columns = tall // images.image_size, wide // images.image_size
        return Tiling(
            rows,
            columns,
            num_tiles > rows * columns,
            images.image_size,
            isqrt(processor.image_seq_length),
        )

    def target_ratios(self) -> Iterable[tuple[int, int]]:
        return self.get_hf_processor().resolve_target_ratios(use_thumbnail=False)


class PrunedInternVLProcessor(PrunedProcessor, InternVLMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""

    pixels_field = "pixel_values_flat"


class PrunedInternS1ProcessingInfo(InternTilingInfo, InternS1ProcessingInfo):
    """vLLM's data of InternVLForConditionalGeneration, with the grids of an image."""

    def tiling(self, width: int, height: int, processor_kwargs: Mapping[str, object]) -> Tiling:
        processor = self.get_hf_processor(**processor_kwargs)
        images: Any = processor.image_processor
        # As InternVLProcessor calls the image processor: its defaults count more than the image
        # processor's own configuration, and the keywords count most.
        merged: Any = {
            "min_patches": images.min_patches,
            "max_patches": images.max_patches,
            **InternVLProcessorKwargs._defaults["images_kwargs"],
            **self.ctx.get_merged_mm_kwargs(processor_kwargs),
        }
        tile = images.size.height, images.size.width
        columns = rows = 1
        if merged["crop_to_patches"]:
            columns, rows = get_optimal_tiled_canvas(
                (height, width), tile, merged["min_patches"], merged["max_patches"]
            )
        side = isqrt(processor.image_seq_length)
        return Tiling(rows, columns, rows * columns > 1, tile[0], side)

    def target_ratios(self) -> Iterable[tuple[int, int]]:
        return self.resolve_target_ratios()

    def get_num_image_tokens(
        self,
        *,
        image_width: int,
        image_height: int,
        processor: object,
        mm_kwargs: Mapping[str, object],
    ) -> int:
        # vLLM's count is one tile if the image processor's configuration has no crop_to_patches,
        # and InternVLProcessor cuts tiles all the same.
        return self.layout(image_width, image_height, mm_kwargs).num_tokens


class PrunedInternS1Processor(PrunedProcessor, InternS1MultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


class ImageTokens(NamedTuple):
    """An image's V visual tokens, in the order of its grids, on the host.

    Attributes:
        patches: (V, k) int64, the patches of each token, in the order of its features; numbered
            through all tiles of the image.
        prompt_order: (V,) int64, number of each token in the prompt.
    """

    patches: torch.Tensor
    prompt_order: torch.Tensor


class LastLayer(NamedTuple):
    """The last layer of the encoder.

    Attributes:
        parts: Its modules.
        key_projection: The module whose output has the keys before any norm.
        keys_of: (B, T, local heads * D) keys in that output.
        head_dim: D.
        scale: Factor on the scores of query and key.
        ranks: Tensor-parallel ranks that share the heads.
    """

    parts: LayerParts
    key_projection: nn.Module
    keys_of: Callable[[Any], torch.Tensor]
    head_dim: int
    scale: float
    ranks: int


class _Encoded(NamedTuple):
    """An encoder run up to the attention of the last layer; S tiles of T rows, [CLS] first.

    Attributes:
        tiles: (S, 3, height, width) pixels.
        query, key: (S, T, local heads * D), as the attention gets them.
        raw_key: (S, T, local heads * D), before any norm.
        first_tiles: First tile of each image, and S.
    """

    tiles: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    raw_key: torch.Tensor
    first_tiles: Sequence[int]


class InternModel(PrunedModel):
    """Encodes images in tiles, and in the encoder's last layer no more rows than are kept.

    A mixin of vLLM's model, which has ``pixel_shuffle`` and ``downsample_ratio``.

    Attributes:
        pixels_field: Name of the field with the tiles.
    """

    pixels_field: str

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.set_up_tiles()

    def set_up_tiles(self) -> None:
        self._tokens_of: Callable[[Grids], ImageTokens]
        self._tokens_of = lru_cache(maxsize=256)(self._find_tokens)

    # What the two forms add.

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile."""
        raise NotImplementedError

    @property
    def last_layer(self) -> LastLayer:
        """The layer whose attention Stage I reads."""
        raise NotImplementedError

    def run_tower(self, tiles: torch.Tensor) -> torch.Tensor:
        """(S, T, C) output of the encoder for (S, 3, height, width) tiles."""
        raise NotImplementedError

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(..., H) embeddings of (..., k * C) features of tokens."""
        raise NotImplementedError

    # Stage I.

    def _find_tokens(self, grids: Grids) -> ImageTokens:
        """Send the patches' numbers through vLLM's pixel shuffle, and see where they come out."""
        this: Any = self
        patch_side = self.patches_per_side
        numbers = torch.arange(patch_side**2).view(1, patch_side, patch_side, 1)
        shuffled = this.pixel_shuffle(numbers, scale_factor=this.downsample_ratio)
        of_tile = shuffled.flatten(1, 2)[0]  # (tokens of a tile, k)
        side = shuffled.shape[1]
        first = of_tile.min(dim=1).values
        per_token = patch_side // side
        row, column = first // patch_side // per_token, first % patch_side // per_token
        in_prompt, patches, before, tile = [], [], 0, 0
        for grid in grids:
            for top in range(0, grid.rows, side):
                for left in range(0, grid.columns, side):
                    in_prompt.append(before + (top + row) * grid.columns + left + column)
                    patches.append(tile * patch_side**2 + of_tile)
                    tile += 1
            before += grid.num_tokens
        order = torch.cat(in_prompt).argsort()
        return ImageTokens(torch.cat(patches)[order], order)

    def prompt_order(self, grids: Grids, device: torch.device) -> torch.Tensor:
        return async_tensor_h2d(self._tokens_of(grids).prompt_order, device=device)

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        tiles = inputs["image_num_patches"]
        before, within = (int(part.sum()) for part in (tiles[:first], tiles[first:end]))
        return {
            self.pixels_field: inputs[self.pixels_field][before : before + within],
            "image_num_patches": tiles[first:end],
            "image_token_id": inputs["image_token_id"],
        }

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        tiles = inputs[self.pixels_field]
        first_tiles = [*accumulate(inputs["image_num_patches"].tolist(), initial=0)]
        num_patches = self.patches_per_side**2
        last = self.last_layer
        rows_of: dict[ImageShape, torch.Tensor] = {}  # (B, n, k) rows of kept tokens
        raw_keys: list[torch.Tensor] = []

        def select_rows(query: torch.Tensor, key: torch.Tensor) -> KeptRows:
            encoded = _Encoded(tiles, query, key, raw_keys.pop(), first_tiles)
            device = query.device
            kept: Kept = keep(partial(self._view_of, last, encoded))
            for shape, numbers in groups.items():
                tokens = self._tokens_of(shape.grids)
                if shape in kept:
                    patches = async_tensor_h2d(tokens.patches, device=device)[kept[shape].index]
                else:
                    in_prompt = tokens.patches[tokens.prompt_order.argsort()]
                    patches = async_tensor_h2d(in_prompt, device=device)[None]
                firsts = torch.tensor([first_tiles[number] for number in numbers])
                firsts = async_tensor_h2d(firsts, device=device)[:, None, None]
                patches = patches + num_patches * firsts
                # Each tile begins with [CLS].
                rows_of[shape] = patches + patches.div(num_patches, rounding_mode="floor") + 1
            return KeptRows(None, None, torch.cat([rows.flatten() for rows in rows_of.values()]))

        hook = last.key_projection.register_forward_hook(
            lambda _, __, output: raw_keys.append(last.keys_of(output))
        )
        try:
            with skip_dropped_rows(last.parts, select_rows):
                features = self.run_tower(tiles).flatten(0, 1)
        finally:
            hook.remove()
        return {shape: self.project(features[rows].flatten(2)) for shape, rows in rows_of.items()}

    def _view_of(
        self, last: LastLayer, encoded: _Encoded, shape: ImageShape, numbers: Sequence[int]
    ) -> EncoderView:
        """The encoder's last layer on the images ``numbers``."""
        firsts = encoded.first_tiles
        used = [tile for n in numbers for tile in range(firsts[n], firsts[n + 1])]
        query, key = (
            select_items(rows, used).unflatten(-1, (-1, last.head_dim))
            for rows in (encoded.query, encoded.key)
        )
        patches = async_tensor_h2d(self._tokens_of(shape.grids).patches, device=key.device)

        def of_tokens(of_patches: torch.Tensor) -> torch.Tensor:
            """(tiles, P, ...) of patches to (B, V, ...) float32 averages over tokens' patches."""
            of_images = of_patches.unflatten(0, (len(numbers), -1)).flatten(1, 2)
            return of_images[:, patches].float().mean(dim=2)

        return self.view_of_layer(
            last.ranks,
            queries=lambda: query,
            keys=key,
            cls_query=query[:, 0],
            to_tokens=of_tokens,
            features=lambda: of_tokens(select_items(encoded.raw_key, used)[:, 1:]),
            scale=last.scale,
            grids=shape.grids,
            pixels=select_items(encoded.tiles, used).unflatten(0, (len(numbers), -1)),
            prompt_order=self.prompt_order(shape.grids, key.device),
        )


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor,
    info=PrunedInternVLProcessingInfo,
    dummy_inputs=InternVLDummyInputsBuilder,
)
class PrunedInternVLChatModel(InternModel, InternVLChatModel):
    """vLLM's InternVLChatModel, which encodes a pruned image's kept tokens only."""

    pixels_field = "pixel_values_flat"

    @property
    def patches_per_side(self) -> int:
        vision: Any = self.config.vision_config
        patches: int = vision.image_size // vision.patch_size
        return patches

    @property
    def last_layer(self) -> LastLayer:
        layer: Any = self.vision_model.encoder.layers[-1]
        attention = layer.attn
        return LastLayer(
            LayerParts(attention.attn, attention.proj, layer.norm2, layer.mlp),
            attention.qkv,
            lambda output: output[0].chunk(3, dim=-1)[1],
            attention.head_dim,
            attention.scale,
            attention.tp_size,
        )

    def run_tower(self, tiles: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.vision_model(pixel_values=tiles)
        return encoded

    def project(self, features: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.mlp1(features)
        return embeddings


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternS1Processor,
    info=PrunedInternS1ProcessingInfo,
    dummy_inputs=InternS1DummyInputsBuilder,
)
class PrunedInternVLForConditionalGeneration(InternModel, InternS1ForConditionalGeneration):
    """vLLM's InternVL in the form of transformers, which encodes kept tokens only.

    All tensor-parallel ranks compute all heads of its encoder.
    """

    pixels_field = "pixel_values"

    @property
    def patches_per_side(self) -> int:
        vision: Any = self.config.vision_config
        patches: int = vision.image_size[0] // vision.patch_size[0]
        return patches

    @property
    def last_layer(self) -> LastLayer:
        layer: Any = self.vision_tower.encoder.layer[-1]
        attention = layer.attention
        return LastLayer(
            LayerParts(
                attention.attn, attention.projection_layer, layer.layernorm_after, layer.mlp
            ),
            attention.k_proj,
            lambda output: output,
            attention.head_dim,
            attention.scale,
            1,
        )

    def run_tower(self, tiles: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.vision_tower(pixel_values=tiles)
        return encoded

    def project(self, features: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.multi_modal_projector(features)
        return embeddings
