"""LLaVA-NeXT and LLaVA-OneVision with three-stage pruning as one dense forward, float32."""

from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from tests.engine.dense_oracle import DenseLlava, Encoded, Tile
from tests.engine.requests import RequestSpec, sample_image, sample_video
from tests.families.qwen_oracle import root_mean_square_distance
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings


class _Token(NamedTuple):
    """A visual token.

    Attributes:
        parts: (tile, patch, share) of each patch that it is an average of; empty for a row mark.
        position: Its place in the image, (row / rows, column / columns).
    """

    parts: list[tuple[int, int, float]]
    position: tuple[np.float32, np.float32]


class DenseLlavaNext(DenseLlava):
    """Tiles and row marks; the decoder is LLaVA-1.5's."""

    density_scale: float | None = 8.0

    def scaled(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that the model scales a grid of patches to."""
        return rows, columns

    def tokens_of(self, image: Image.Image) -> list[_Token]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        tokens = [
            _Token([(0, patch, 1.0)], place)
            for patch, place in enumerate(oracle.positions(range(side * side), side, side))
        ]
        # The tiles: the image is scaled to fit and stands in their middle.
        width, height = image.size
        tall, wide = self.best_resolution(width, height)
        rows, columns = (edge // vision.image_size * side for edge in (tall, wide))
        top = left = 0
        if width / height > wide / tall:
            top = (rows - int(round(height * columns / width, 7))) // 2
        else:
            left = (columns - int(round(width * rows / height, 7))) // 2
        tiles_per_row = columns // side
        rows, columns = rows - 2 * top, columns - 2 * left
        new_rows, new_columns = self.scaled(rows, columns)
        for row in range(new_rows):
            down = np.float32(row) / np.float32(new_rows)
            for column in range(new_columns):
                parts = []
                for r, row_share in neighbours(row, rows, new_rows):
                    for c, column_share in neighbours(column, columns, new_columns):
                        y, x = top + r, left + c
                        tile = 1 + y // side * tiles_per_row + x // side
                        patch = y % side * side + x % side
                        parts.append((tile, patch, row_share * column_share))
                tokens.append(_Token(parts, (down, np.float32(column) / np.float32(new_columns))))
            tokens.append(_Token([], (down, np.float32(1))))
        return tokens

    def best_resolution(self, width: int, height: int) -> tuple[int, int]:
        """Of the resolutions, that with most pixels of the image, then with least padding."""

        def merit(resolution: list[int]) -> tuple[int, int]:
            tall, wide = resolution
            scale = min(wide / width, tall / height)
            used = min(int(width * scale) * int(height * scale), width * height)
            return used, -(wide * tall - used)

        tall, wide = max(self.config.image_grid_pinpoints, key=merit)
        return tall, wide

    def visual_tokens(self, image: Image.Image) -> int:
        return len(self.tokens_of(image))

    def encode(self, image: Image.Image, counts: VisualTokenCounts) -> Encoded:
        pixels = self.pixels_of(image)
        tiles = [self.run_tower(tile[None]) for tile in pixels]
        tokens = self.tokens_of(image)
        n1 = counts.stages[0]
        saliency = torch.stack(
            [self.average([t.saliency for t in tiles], token) for token in tokens]
        )
        kept = self.choose_tokens_of(image, tokens, saliency, pixels, n1)
        chosen = [tokens[i] for i in kept]
        labels = []
        if counts.centres:
            keys = torch.stack([self.average([t.keys for t in tiles], token) for token in chosen])
            scale = self.density_scale
            if scale is None:
                relative = PruningSettings().relative_density_scale
                scale = relative * root_mean_square_distance(keys.numpy())
            labels = oracle.labels(
                keys.numpy(), [t.position for t in chosen], counts.centres, density_scale=scale
            )
        projected = [self.project(tile.features) for tile in tiles]
        embeds = [
            self.average(projected, token) if token.parts else self.weights["model.image_newline"]
            for token in chosen
        ]
        return Encoded(torch.stack(embeds), labels, [(i,) for i in range(n1)], n1)

    def choose_tokens_of(
        self,
        image: Any,
        tokens: list[_Token],
        saliency: torch.Tensor,
        pixels: torch.Tensor,
        n1: int,
    ) -> list[int]:
        return self.choose_patches(torch.empty(len(tokens)), saliency, pixels[None], n1)

    def pixels_of(self, image: Image.Image) -> torch.Tensor:
        """(tiles, 3, height, width)."""
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        tiles: torch.Tensor = pixels["pixel_values"][0]
        return tiles

    @staticmethod
    def average(of_tiles: list[torch.Tensor], token: _Token) -> torch.Tensor:
        """The token's average of values of patches; 0 for a row mark."""
        total = torch.zeros_like(of_tiles[0][0])
        for tile, patch, share in token.parts:
            total = total + share * of_tiles[tile][patch]
        return total


def corners(token: _Token) -> list[int]:
    """The patches of a token, those that stand for several of its four corners repeated."""
    patches = [patch for _, patch, _ in token.parts]
    return patches * (4 // len(patches))


def neighbours(place: int, old: int, new: int) -> list[tuple[int, float]]:
    """Places among ``old`` that bilinear scaling to ``new`` averages at ``place``, with shares."""
    centre = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
    low = floor(centre)
    share = centre - low
    return [(low, 1.0)] if share < 1e-9 else [(low, 1 - share), (low + 1, share)]


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        video: (frames, 3, height, width) pixels of all frames.
        number: Which of them it is.
    """

    video: torch.Tensor
    number: int


class DenseLlavaOnevision(DenseLlavaNext):
    """SigLIP without [CLS], and tiles that are scaled down if they are more than nine.

    Frames of videos are scaled down to half of their rows and columns. A video ends with the token
    that ends the rows of images, given by ``None``.
    """

    density_scale = None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.image_token = self.config.image_token_index
        self.video_token = self.config.video_token_index

    def images(self, spec: RequestSpec) -> list[Any]:
        images: list[Any] = []
        for kind, seed in spec.media():
            if kind == "i":
                images.append(sample_image(seed))
                continue
            frames, _ = sample_video(seed)
            pixels = self.processor.video_processor(videos=[frames], return_tensors="pt")
            video = pixels["pixel_values_videos"][0]
            images += [*(Frame(video, number) for number in range(len(video))), None]
        return images

    def tokens_of(self, image: Any) -> list[_Token]:
        if not isinstance(image, Frame):
            return super().tokens_of(image)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        new = ceil(side / 2)
        places = oracle.positions(range(new * new), new, new)
        tokens = []
        for token, place in enumerate(places):
            parts = [
                (0, row * side + column, row_share * column_share)
                for row, row_share in neighbours(token // new, side, new)
                for column, column_share in neighbours(token % new, side, new)
            ]
            tokens.append(_Token(parts, place))
        return tokens

    def pixels_of(self, image: Any) -> torch.Tensor:
        if not isinstance(image, Frame):
            return super().pixels_of(image)
        return image.video[image.number, None]

    def plan(self, settings: PruningSettings, ratio: float, image: Any) -> VisualTokenCounts:
        if isinstance(image, Frame):
            tokens = self.visual_tokens(image)
            ratio = self.ratio_of_frame(ratio, tokens, image.number, len(image.video))
        return super().plan(settings, ratio, image)

    def choose_tokens_of(self, image, tokens, saliency, pixels, n1):
        if not self.compares_frames or not isinstance(image, Frame) or not image.number:
            return super().choose_tokens_of(image, tokens, saliency, pixels, n1)
        before, now = (
            [
                np.concatenate([self.patch(image.video[number], place) for place in corners(token)])
                for token in tokens
            ]
            for number in (image.number - 1, image.number)
        )
        changed = oracle.shows_change(before, now)
        return oracle.largest_of_changed(saliency.tolist(), changed, n1)

    def patch(self, frame: torch.Tensor, place: int) -> np.ndarray:
        """Pixels of a patch of a frame."""
        size = self.config.vision_config.patch_size
        row, column = divmod(place, self.config.vision_config.image_size // size)
        rows, columns = (slice(size * i, size * (i + 1)) for i in (row, column))
        return frame[:, rows, columns].flatten().numpy()

    def visual_tokens(self, image: Any) -> int:
        return 1 if image is None else super().visual_tokens(image)

    def encode(self, image: Any, counts: VisualTokenCounts) -> Encoded:
        if image is None:
            return Encoded(self.weights["model.image_newline"][None], [], [(0,)], 1)
        return super().encode(image, counts)

    def scaled(self, rows: int, columns: int) -> tuple[int, int]:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        ratio = sqrt(rows * columns / (9 * side * side))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def run_tower(self, pixels: torch.Tensor) -> Tile:
        config = self.config.vision_config
        tower = "model.vision_tower.vision_model"
        embeddings = f"{tower}.embeddings"
        x = F.conv2d(
            pixels,
            self.weights[f"{embeddings}.patch_embedding.weight"],
            self.weights[f"{embeddings}.patch_embedding.bias"],
            stride=config.patch_size,
        )
        x = x[0].flatten(1).T + self.weights[f"{embeddings}.position_embedding.weight"]
        heads = config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            name = f"{tower}.encoder.layers.{layer}"
            y = self.layer_norm(f"{name}.layer_norm1", x)
            query, key, value = (
                self.linear(f"{name}.self_attn.{p}_proj", y).unflatten(-1, (heads, -1))
                for p in "qkv"
            )
            scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
            y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
            x = x + self.linear(f"{name}.self_attn.out_proj", y)
            y = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.layer_norm2", x))
            x = x + self.linear(f"{name}.mlp.fc2", F.gelu(y, approximate="tanh"))
        received = scores.softmax(-1).mean(1).sum(0)
        return Tile(x, received, key.flatten(1))

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        eps = self.config.vision_config.layer_norm_eps
        return F.layer_norm(x, weight.shape, weight, bias, eps)
