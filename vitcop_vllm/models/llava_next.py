"""LLaVA-NeXT with visual token pruning.

The encoder gets an image several times: scaled down to one tile, and cut into tiles at a higher
resolution. vLLM's model puts the tiles together, cuts padding off and ends each row with a mark, an
embedding that is equal for all images.

Stage I ranks all visual tokens of an image together, whatever their tile. A row mark has saliency
0: it stands for no part of the image, and the number of tokens that are left of a row is not known
on the host. So marks are dropped before any other token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.clip_rows import KeptRows, skip_dropped_rows
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.processing import PrunedProcessingInfo, PrunedProcessor
from vitcop_vllm.models.pruned_model import ImageInputs, PrunedModel
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    no_embeddings_yet,
    select_items,
)
from vitcop_vllm.models.tensor_parallel import concat_over_ranks, mean_over_ranks
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.views import EncoderView

_MARK = -1
"""Stands for a row mark where other tokens have the index of their patch."""


class PrunedLlavaNextProcessingInfo(PrunedProcessingInfo, LlavaNextProcessingInfo):
    """A grid for the image scaled down to one tile, then a grid with row marks for all tiles."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        encoder = self.get_vision_encoder_info()
        side: int = encoder.get_patch_grid_length()
        tile_rows, tile_columns = get_anyres_image_grid_shape(
            image_size=(height, width),
            grid_pinpoints=self.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        tokens, rows = self._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=tile_rows,
            num_patch_width=tile_columns,
        )
        box = (0.0, 0.0, float(width), float(height))
        # Of a very thin image, unpadding leaves no row, or no part of a row but its mark.
        tiles = Grid(rows, tokens // max(rows, 1), row_marks=True)
        return ImageLayout((Grid(side, side), tiles), box)

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        if self.get_max_image_tokens() <= max_tokens:
            return None
        sizes = {
            self.layout(width, height).num_tokens: (width, height)
            for height, width in self.get_hf_config().image_grid_pinpoints
        }
        return sizes[max((n for n in sizes if n <= max_tokens), default=min(sizes))]


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """vLLM's processor, with as many placeholders per image as Stage I keeps."""


class _PackedImage(NamedTuple):
    """An image's tiles in an encoder run.

    Attributes:
        first_tile: Index of its first tile, the whole image scaled down.
        num_tiles: Number of its tiles.
        patches: (V,) int64, for each visual token the index of its patch among those of the image's
            tiles; :data:`_MARK` for a row mark. On the host.
    """

    first_tile: int
    num_tiles: int
    patches: torch.Tensor


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor,
    info=PrunedLlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PrunedLlavaNextForConditionalGeneration(PrunedModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT; Stage I reads the attention of CLIP's [CLS], tile by tile."""

    published_density_scale = 8.0  # the tower is LLaVA-1.5's

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision: Any = self.config.vision_config
        self._patches_per_tile: int = (vision.image_size // vision.patch_size) ** 2
        self._patches_of: Callable[[int, int, int], torch.Tensor] = lru_cache(maxsize=1024)(
            self._merge_patch_numbers
        )

    def _merge_patch_numbers(self, num_tiles: int, height: int, width: int) -> torch.Tensor:
        """(V,) int64 patches of an image's visual tokens; :data:`_MARK` for a row mark.

        vLLM's own method puts the numbers of the patches together as it does their embeddings.
        """
        numbers = torch.arange(num_tiles * self._patches_per_tile, dtype=torch.float64)
        model: Any = SimpleNamespace(
            config=self.config, image_newline=torch.tensor([_MARK], dtype=torch.float64)
        )
        merged: torch.Tensor = LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
            model,
            torch.tensor([height, width]),
            numbers.view(num_tiles, self._patches_per_tile, 1),
            strategy="spatial_unpad",
        )
        return merged.squeeze(1).long()

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        return {name: inputs[name][first:end] for name in ("pixel_values", "image_sizes")}

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        images, tiles = self._pack(inputs)
        layer = self.vision_tower.vision_model.encoder.layers[-1]
        patches = {
            shape: self._patches_among_tiles([images[number] for number in numbers], tiles.device)
            for shape, numbers in groups.items()
        }

        def select_rows(qkv: torch.Tensor) -> KeptRows:
            kept: Kept = keep(partial(self._view_of, layer.self_attn, qkv, tiles, images))
            for shape, tokens in kept.items():
                patches[shape] = patches[shape].gather(1, tokens.index)
            rows = torch.cat([of_shape.flatten() for of_shape in patches.values()])
            # Each tile has one row more than patches: its [CLS], which is first. A row mark needs
            # no row and gets row 0, the [CLS] of the first tile, which no token needs.
            tile = rows.div(self._patches_per_tile, rounding_mode="floor")
            return KeptRows(None, None, torch.where(rows == _MARK, 0, rows + tile + 1))

        with skip_dropped_rows(layer, select_rows):
            features = self._image_pixels_to_features(self.vision_tower, tiles).flatten(0, 1)
        embedded = {}
        for shape, of_shape in patches.items():
            tokens = self.multi_modal_projector(features[of_shape.clamp(min=0)])
            is_mark = (of_shape == _MARK)[:, :, None]
            embedded[shape] = torch.where(is_mark, self.image_newline.to(tokens.dtype), tokens)
        return embedded

    def _pack(self, inputs: ImageInputs) -> tuple[list[_PackedImage], torch.Tensor]:
        """The images of a run, and their tiles without those that vLLM added as padding."""
        images: list[_PackedImage] = []
        tiles: list[torch.Tensor] = []
        first = 0
        sizes = inputs["image_sizes"].tolist()
        for pixels, (height, width) in zip(inputs["pixel_values"], sizes, strict=True):
            patches = self._patches_of(len(pixels), height, width)
            num_tiles = int(patches.max()) // self._patches_per_tile + 1
            images.append(_PackedImage(first, num_tiles, patches))
            tiles.append(pixels[:num_tiles])
            first += num_tiles
        return images, torch.cat(tiles)

    def _patches_among_tiles(
        self, images: Sequence[_PackedImage], device: torch.device
    ) -> torch.Tensor:
        """(B, V) int64 patches of images of one shape, among the patches of all tiles."""
        patches = [
            torch.where(
                image.patches == _MARK,
                _MARK,
                image.patches + image.first_tile * self._patches_per_tile,
            )
            for image in images
        ]
        return async_tensor_h2d(torch.stack(patches), device=device)

    def _view_of(
        self,
        attention: Any,
        qkv: torch.Tensor,
        tiles: torch.Tensor,
        images: Sequence[_PackedImage],
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The tower's last layer on the images ``numbers``.

        Args:
            attention: Attention module of that layer.
            qkv: (S, 1 + P, 3 * local heads * D) of all tiles, [CLS] first.
            tiles: (S, 3, height, width) of all images.
            images: All images of the run.
            shape: Shape of the images ``numbers``.
            numbers: Indices in ``images``.
        """
        chosen = [images[number] for number in numbers]
        used = [
            tile
            for image in chosen
            for tile in range(image.first_tile, image.first_tile + image.num_tiles)
        ]
        firsts = accumulate((image.num_tiles for image in chosen), initial=0)
        packed = [
            image._replace(first_tile=first) for image, first in zip(chosen, firsts, strict=False)
        ]
        patches = self._patches_among_tiles(packed, qkv.device)
        query, key, _ = (
            select_items(x, used).unflatten(-1, (-1, attention.head_dim))
            for x in qkv.chunk(3, dim=-1)
        )

        def to_tokens(of_patches: torch.Tensor) -> torch.Tensor:
            """(S, P, ...) of the tiles to (B, V, ...); 0 for a row mark."""
            tokens = of_patches.flatten(0, 1)[patches.clamp(min=0)]
            is_mark = (patches == _MARK).view(*patches.shape, *(1,) * (tokens.dim() - 2))
            return tokens.masked_fill(is_mark, 0.0)

        ranks = attention.tp_size
        return EncoderView(
            queries=lambda: query,
            keys=key,
            cls_query=query[:, 0],
            to_tokens=to_tokens,
            features=lambda: to_tokens(key[:, 1:].flatten(2)),
            scale=attention.scale,
            grids=shape.grids,
            pixels=select_items(tiles, [image.first_tile for image in chosen]),
            embed=no_embeddings_yet,
            mean_over_ranks=partial(mean_over_ranks, ranks=ranks),
            concat_over_ranks=partial(concat_over_ranks, ranks=ranks),
            kernels=self.kernels,
        )
