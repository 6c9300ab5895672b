"""LLaVA-NeXT with three-stage pruning as one dense forward in plain PyTorch, float32."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from tests.engine.dense_oracle import DenseLlava, Encoded
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts


class _Token(NamedTuple):
    """A visual token: a patch of a tile, or a row mark (``patch`` is ``None``).

    ``position`` is its place in the image, (row / rows, column / columns).
    """

    tile: int
    patch: int | None
    position: tuple[np.float32, np.float32]


class DenseLlavaNext(DenseLlava):
    """Tiles and row marks; the decoder is LLaVA-1.5's."""

    def tokens_of(self, image: Image.Image) -> list[_Token]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        tokens = [
            _Token(0, patch, place)
            for patch, place in enumerate(oracle.positions(range(side * side), side, side))
        ]
        # The tiles: the image is scaled to fit and stands in their middle.
        width, height = image.size
        tall, wide = self.best_resolution(width, height)
        rows, columns = tall // vision.patch_size, wide // vision.patch_size
        top = left = 0
        if width / height > wide / tall:
            top = (rows - int(round(height * columns / width, 7))) // 2
        else:
            left = (columns - int(round(width * rows / height, 7))) // 2
        tiles_per_row = columns // side
        height_in_tokens, width_in_tokens = rows - 2 * top, columns - 2 * left
        for row in range(top, rows - top):
            down = np.float32(row - top) / np.float32(height_in_tokens)
            for column in range(left, columns - left):
                tile = 1 + row // side * tiles_per_row + column // side
                right = np.float32(column - left) / np.float32(width_in_tokens)
                patch = row % side * side + column % side
                tokens.append(_Token(tile, patch, (down, right)))
            tokens.append(_Token(0, None, (down, np.float32(1))))
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
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        tiles = [self.run_tower(tile[None]) for tile in pixels["pixel_values"][0]]
        tokens = self.tokens_of(image)
        saliency = [
            0.0 if t.patch is None else float(tiles[t.tile].saliency[t.patch]) for t in tokens
        ]
        n1 = counts.stages[0]
        kept = self.choose_patches(
            torch.empty(len(tokens)), torch.tensor(saliency), pixels["pixel_values"], n1
        )
        chosen = [tokens[i] for i in kept]
        nothing = torch.zeros_like(tiles[0].keys[0])
        keys = [nothing if t.patch is None else tiles[t.tile].keys[t.patch] for t in chosen]
        labels = []
        if counts.centres:
            labels = oracle.labels(
                torch.stack(keys).numpy(), [t.position for t in chosen], counts.centres
            )
        embeds = [
            self.weights["model.image_newline"]
            if t.patch is None
            else self.project(tiles[t.tile].features[t.patch])
            for t in chosen
        ]
        return Encoded(torch.stack(embeds), labels, [(i,) for i in range(n1)], n1)
