"""Stage I for models that cut an image into tiles: LLaVA-NeXT, LLaVA-OneVision.

The encoder gets an image several times: scaled down to one tile, and cut into tiles at a higher
resolution. vLLM's model puts the tiles together, cuts padding off, may scale the result down, and
ends each row with a mark, an embedding that is equal for all images.

Stage I ranks all visual tokens of an image together, whatever their tile. A row mark has saliency
0: it stands for no part of the image, and the number of tokens that are left of a row is not known
on the host. So marks are dropped before any other token.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.models.clip_rows import KeptRows, LayerParts, skip_dropped_rows
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.models.processing import PrunedProcessingInfo
from vitcop_vllm.models.pruned_encoder import ImageInputs
from vitcop_vllm.models.pruned_model import PrunedModel
from vitcop_vllm.models.stage_one import (
    Groups,
    ImageShape,
    Kept,
    select_items,
)
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.views import EncoderView

_MARK = -1
"""Stands for a row mark where other tokens have the index of their patch."""


class TiledProcessingInfo(PrunedProcessingInfo):
    """A grid for the image scaled down to one tile, then a grid with row marks for all tiles."""

    def layout(
        self, width: int, height: int, processor_kwargs: Mapping[str, object] | None = None
    ) -> ImageLayout:
        this: Any = self
        encoder = this.get_vision_encoder_info()
        side: int = encoder.get_patch_grid_length()
        tile_rows, tile_columns = get_anyres_image_grid_shape(
            image_size=(height, width),
            grid_pinpoints=this.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        tokens, rows = this._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side,
            num_patch_height=tile_rows,
            num_patch_width=tile_columns,
        )
        # Of a very thin image, unpadding leaves no row, or no part of a row but its mark.
        tiles = Grid(rows, tokens // max(rows, 1), row_marks=True)
        # vLLM cuts padding off in whole patches: the tiles' grid exceeds the image, or lacks a part
        # of it, by at most half a patch on each side.
        box = (0.0, 0.0, float(width), float(height))
        return ImageLayout((Grid(side, side), tiles), box)

    def dummy_size(self, max_tokens: int) -> tuple[int, int] | None:
        this: Any = self
        if this.get_max_image_tokens() <= max_tokens:
            return None
        sizes = {
            self.layout(width, height).num_tokens: (width, height)
            for height, width in this.get_hf_config().image_grid_pinpoints
        }
        return sizes[max((n for n in sizes if n <= max_tokens), default=min(sizes))]


class TokenSources(NamedTuple):
    """The patches that an image's V visual tokens are made of, on the host.

    Attributes:
        patches: (V, k) int64 among the patches of the image's tiles; :data:`_MARK` for a row mark.
            k is 4 if the tiles are scaled down, else 1.
        weights: (V, k) float32, shares of the patches in the token; 0 for a row mark.
    """

    patches: torch.Tensor
    weights: torch.Tensor


class TiledImage(NamedTuple):
    """An image's tiles in an encoder run.

    Attributes:
        first_tile: Index of its first tile, the whole image scaled down.
        num_tiles: Number of its tiles.
        sources: Patches of its tokens.
    """

    first_tile: int
    num_tiles: int
    sources: TokenSources


class _TokenPatches(NamedTuple):
    """Patches of the tokens of B images of one shape, on the device.

    Attributes:
        patches: (B, n, k) int64 among the patches of all tiles; :data:`_MARK` for a row mark.
        weights: (B, n, k) float32.
    """

    patches: torch.Tensor
    weights: torch.Tensor

    def gather(self, index: torch.Tensor) -> "_TokenPatches":
        """Those of the tokens at (B, m) ``index``."""
        wide = index[:, :, None].expand(-1, -1, self.patches.shape[2])
        return _TokenPatches(self.patches.gather(1, wide), self.weights.gather(1, wide))

    def blend(self, of_patches: torch.Tensor) -> torch.Tensor:
        """(S * P, ...) rows of all patches to (B, n, ...) float32 of tokens; 0 for a mark."""
        return self.average(of_patches[self.patches.clamp(min=0)])

    def average(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, n, k, ...) rows of the tokens' patches to (B, n, ...) float32; 0 for a mark."""
        weights = self.weights.view(*self.weights.shape, *(1,) * (rows.dim() - 3))
        return (rows.float() * weights).sum(dim=2)


class TiledModel(PrunedModel):
    """Encodes images in tiles, and in the encoder's last layer no more rows than are kept.

    A mixin of vLLM's model, which has ``vision_tower`` (CLIP or SigLIP), ``multi_modal_projector``
    and ``image_newline``.

    Attributes:
        has_cls: Whether each tile's first row in the encoder is [CLS].
    """

    has_cls: bool

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.set_up_tiles()

    def set_up_tiles(self) -> None:
        this: Any = self
        vision: Any = this.config.vision_config
        self._side: int = vision.image_size // vision.patch_size
        self._sources_of: Callable[[int, int, int], TokenSources]
        self._sources_of = lru_cache(maxsize=1024)(self._find_sources)

    def merge_tiles(
        self, tiles: torch.Tensor, height: int, width: int, row_mark: torch.Tensor
    ) -> torch.Tensor:
        """(V, C) tokens of an image, by vLLM's method that puts the tiles of a model together.

        Args:
            tiles: (tiles, P, C).
            height, width: Size of the image as it was sent, in pixels.
            row_mark: (C,).
        """
        raise NotImplementedError

    def _find_sources(self, num_tiles: int, height: int, width: int) -> TokenSources:
        """Send the patches' places through :meth:`merge_tiles`, and see where they come out.

        Places are linear, so a place between patches is where a weighted average was taken.
        """
        this: Any = self
        side = self._side
        tile_columns = get_anyres_image_grid_shape(
            (height, width), this.config.image_grid_pinpoints, this.config.vision_config.image_size
        )[1]
        tile, row, column = torch.meshgrid(
            torch.arange(num_tiles), torch.arange(side), torch.arange(side), indexing="ij"
        )
        # The first tile is the whole image. Its rows lie above those of the others.
        down = torch.where(tile == 0, row, side + (tile - 1) // tile_columns * side + row)
        right = torch.where(tile == 0, column, (tile - 1) % tile_columns * side + column)
        places = torch.stack((down, right), dim=-1).double()
        mark = torch.full((2,), float(_MARK), dtype=torch.float64)
        merged = self.merge_tiles(places.flatten(1, 2), height, width, mark)
        return self._sources_at(merged, tile_columns)

    def _sources_at(self, merged: torch.Tensor, tile_columns: int) -> TokenSources:
        """The patches of tokens that are at these places, as :meth:`_find_sources` places them.

        Args:
            merged: (V, 2) row and column of each token; :data:`_MARK` twice for a row mark.
            tile_columns: Tiles side by side in the image.
        """
        is_mark = (merged == _MARK).all(dim=1, keepdim=True)
        low = merged.floor().long()
        share = merged - low
        if not share.any():
            patches = self._patch_at(low[:, :1], low[:, 1:], tile_columns)
            return TokenSources(patches.masked_fill(is_mark, _MARK), (~is_mark).float())
        high = merged.ceil().long()
        rows, columns = (torch.stack((low[:, axis], high[:, axis]), dim=1) for axis in (0, 1))
        shares = torch.stack((1 - share, share), dim=1)  # (V, 2 neighbours, 2 axes)
        patches = self._patch_at(rows[:, :, None], columns[:, None, :], tile_columns).flatten(1)
        weights = (shares[:, :, None, 0] * shares[:, None, :, 1]).flatten(1).float()
        return TokenSources(patches.masked_fill(is_mark, _MARK), weights.masked_fill(is_mark, 0.0))

    def _patch_at(self, down: torch.Tensor, right: torch.Tensor, tile_columns: int) -> torch.Tensor:
        """Index of the patch at a place, as :meth:`_find_sources` places them."""
        side = self._side
        below = down - side
        tile = torch.where(
            below < 0, 0, 1 + below.clamp(min=0) // side * tile_columns + right // side
        )
        row = torch.where(below < 0, down, below % side)
        return (tile * side + row) * side + right % side

    def slice_images(self, inputs: ImageInputs, first: int, end: int) -> ImageInputs:
        return {name: inputs[name][first:end] for name in ("pixel_values", "image_sizes")}

    def encode_kept(
        self, inputs: ImageInputs, groups: Groups, keep: Any
    ) -> Mapping[ImageShape, torch.Tensor]:
        this: Any = self
        images, tiles = self.pack_tiles(inputs)
        layer = this.vision_tower.vision_model.encoder.layers[-1]
        of_shape = {
            shape: self._token_patches([images[number] for number in numbers], tiles.device)
            for shape, numbers in groups.items()
        }

        def select_rows(query: torch.Tensor, key: torch.Tensor) -> KeptRows:
            kept: Kept = keep(partial(self._view_of, layer.self_attn, query, key, tiles, images))
            for shape, tokens in kept.items():
                of_shape[shape] = of_shape[shape].gather(tokens.index)
            patches = torch.cat([tokens.patches.flatten() for tokens in of_shape.values()])
            return KeptRows(None, None, self._rows_of(patches))

        with skip_dropped_rows(LayerParts.of_clip(layer), select_rows):
            features = this._image_pixels_to_features(this.vision_tower, tiles).flatten(0, 1)
        return {shape: self._embed(features, tokens) for shape, tokens in of_shape.items()}

    def _rows_of(self, patches: torch.Tensor) -> torch.Tensor:
        """(N,) rows of the encoder for (N,) patches; row 0 for row marks, which need no row."""
        if self.has_cls:
            tile = patches.div(self._side**2, rounding_mode="floor")
            patches = patches + tile + 1
        return patches.clamp(min=0)

    def _embed(self, features: torch.Tensor, tokens: _TokenPatches) -> torch.Tensor:
        """(B, n, H) embeddings of tokens from (S * P, C) features of patches."""
        this: Any = self
        patches = tokens.patches
        projected = this.multi_modal_projector(features[patches.clamp(min=0)])
        embeddings = tokens.average(projected).to(projected.dtype)
        is_mark = patches[:, :, :1] == _MARK
        return torch.where(is_mark, this.image_newline.to(embeddings.dtype), embeddings)

    def pack_tiles(self, inputs: ImageInputs) -> tuple[list[TiledImage], torch.Tensor]:
        """The images of a run, and their tiles without padding tiles."""
        images: list[TiledImage] = []
        tiles: list[torch.Tensor] = []
        first = 0
        sizes = inputs["image_sizes"].tolist()
        for pixels, (height, width) in zip(inputs["pixel_values"], sizes, strict=True):
            sources = self._sources_of(len(pixels), height, width)
            num_tiles = int(sources.patches.max()) // self._side**2 + 1
            images.append(TiledImage(first, num_tiles, sources))
            tiles.append(pixels[:num_tiles])
            first += num_tiles
        return images, torch.cat(tiles)

    def _token_patches(self, images: Sequence[TiledImage], device: torch.device) -> _TokenPatches:
        """Patches of images of one shape, among the patches of all tiles."""
        most = max(image.sources.patches.shape[1] for image in images)
        patches, weights = [], []
        for first, _, sources in images:
            # An image without averages repeats its patch, with a share of 0.
            extra = most - sources.patches.shape[1]
            shifted = torch.where(
                sources.patches == _MARK, _MARK, sources.patches + first * self._side**2
            )
            patches.append(torch.cat((shifted, shifted[:, :1].expand(-1, extra)), dim=1))
            weights.append(torch.nn.functional.pad(sources.weights, (0, extra)))
        return _TokenPatches(
            async_tensor_h2d(torch.stack(patches), device=device),
            async_tensor_h2d(torch.stack(weights), device=device),
        )

    def _view_of(
        self,
        attention: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        tiles: torch.Tensor,
        images: Sequence[TiledImage],
        shape: ImageShape,
        numbers: Sequence[int],
    ) -> EncoderView:
        """The encoder's last layer on the images ``numbers``.

        Args:
            attention: Attention module of that layer.
            query, key: (S, T, local heads * D) of all tiles; [CLS] first, if there is one.
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
        tokens = self._token_patches(packed, query.device)
        query, key = (
            select_items(x, used).unflatten(-1, (-1, attention.head_dim)) for x in (query, key)
        )
        first_patch = int(self.has_cls)
        return self.view_of_layer(
            attention.tp_size,
            queries=lambda: query,
            keys=key,
            cls_query=query[:, 0] if self.has_cls else None,
            to_tokens=lambda of_patches: tokens.blend(of_patches.flatten(0, 1)),
            features=lambda: tokens.blend(key[:, first_patch:].flatten(2).flatten(0, 1)),
            scale=attention.scale,
            grids=shape.grids,
            pixels=select_items(tiles, [image.first_tile for image in chosen]),
        )
