"""InternVL with three-stage pruning as one dense forward in plain PyTorch, float32."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Qwen2Config

from tests.checkpoints.tiny import INTERNVL_CHAT
from tests.engine.dense_oracle import DenseModel, Encoded, Tile
from tests.families.qwen_oracle import root_mean_square_distance
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

SIDE = 5
"""Visual tokens along a side of a tile."""

HEADS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Token(NamedTuple):
    """A visual token.

    Attributes:
        number: Its number in the image's grids, row by row.
        tile: Number of its tile.
        patches: Its patches in the tile: top left, top right, bottom left, bottom right.
        position: Its place in the image, (row / rows, column / columns).
    """

    number: int
    tile: int
    patches: list[int]
    position: tuple[np.float32, np.float32]


class DenseInternVL(DenseModel):
    """InternVL in the form of transformers; its decoder is Qwen3."""

    num_axes = 1
    settings = PruningSettings(decoder_signal="values")

    def __init__(self, path: Path, boundaries: tuple[int, int], **options: Any):
        super().__init__(path, boundaries, **options)
        self.image_token = self.config.image_token_id
        self.set_axes()

    def set_axes(self) -> None:
        text = self.config.text_config
        self.axes = [0] * (text.hidden_size // text.num_attention_heads // 2)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """(tiles, 3, height, width), the thumbnail last."""
        processed = self.processor.image_processor(
            image.convert("RGB"), crop_to_patches=True, return_tensors="pt"
        )
        tiles: torch.Tensor = processed["pixel_values"]
        return tiles

    def tokens_of(self, image: Image.Image) -> list[_Token]:
        """The image's tokens in the order of the prompt: tile by tile."""
        tile_rows, tile_columns = INTERNVL_CHAT.tiles(*image.size)
        tokens = self.grid_tokens(tile_rows, tile_columns, 0, 0)
        if tile_rows * tile_columns > 1:
            tokens += self.grid_tokens(1, 1, len(tokens), tile_rows * tile_columns)
        return tokens

    @staticmethod
    def grid_tokens(rows: int, columns: int, first: int, tile: int) -> list[_Token]:
        """Tokens of a grid of tiles; ``first`` token and ``tile`` before it."""
        tokens = []
        wide = 2 * SIDE
        for tile_row in range(rows):
            for tile_column in range(columns):
                for r in range(SIDE):
                    for c in range(SIDE):
                        row, column = tile_row * SIDE + r, tile_column * SIDE + c
                        corner = 2 * r * wide + 2 * c
                        down = np.float32(row) / np.float32(rows * SIDE)
                        across = np.float32(column) / np.float32(columns * SIDE)
                        tokens.append(
                            _Token(
                                first + row * columns * SIDE + column,
                                tile,
                                [corner, corner + 1, corner + wide, corner + wide + 1],
                                (down, across),
                            )
                        )
                tile += 1
        return tokens

    def visual_tokens(self, image: Image.Image) -> int:
        return len(self.tokens_of(image))

    def encode(self, image: Image.Image, counts: VisualTokenCounts) -> Encoded:
        tiles = [self.run_tower(tile[None]) for tile in self.pixels(image)]
        tokens = self.tokens_of(image)
        n1 = counts.stages[0]
        numbers = torch.tensor([token.number for token in tokens])
        saliency = torch.empty(len(tokens))
        saliency[numbers] = torch.stack(
            [tiles[token.tile].saliency[token.patches].mean() for token in tokens]
        )
        chosen_numbers = self.choose_patches(saliency, n1, numbers.tolist())
        by_number = {token.number: token for token in tokens}
        chosen = [by_number[number] for number in chosen_numbers]
        labels = []
        if counts.centres:
            keys = torch.stack([tiles[token.tile].keys[token.patches].mean(0) for token in chosen])
            scale = PruningSettings().relative_density_scale
            labels = oracle.labels(
                keys.numpy(),
                [token.position for token in chosen],
                counts.centres,
                density_scale=scale * root_mean_square_distance(keys.numpy()),
            )
        features = [tiles[token.tile].features[token.patches].flatten() for token in chosen]
        embeds = self.project(torch.stack(features))
        return Encoded(embeds, labels, [(i,) for i in range(n1)], n1)

    def choose_patches(self, saliency: torch.Tensor, n1: int, in_prompt: list[int]) -> list[int]:
        """Numbers of the kept tokens, in the order of the prompt."""
        kept = {*oracle.largest(saliency.tolist(), n1)}
        return [number for number in in_prompt if number in kept]

    # The encoder.

    def run_tower(self, pixels: torch.Tensor) -> Tile:
        """Run the encoder on (1, 3, height, width) of one tile."""
        tower = "model.vision_tower"
        patch = f"{tower}.embeddings.patch_embeddings.projection"
        weight = self.weights[f"{patch}.weight"]
        x = F.conv2d(pixels, weight, self.weights[f"{patch}.bias"], stride=weight.shape[-1])
        cls = self.weights[f"{tower}.embeddings.cls_token"][0]
        x = torch.cat((cls, x[0].flatten(1).T))
        x = x + self.weights[f"{tower}.embeddings.position_embeddings"][0]
        layer = 0
        while f"{tower}.encoder.layer.{layer}.lambda_1" in self.weights:
            name = f"{tower}.encoder.layer.{layer}"
            attention = f"{name}.attention"
            y = self.vision_norm(f"{name}.layernorm_before", x)
            query, raw_key, value = (self.linear(f"{attention}.{p}_proj", y) for p in "qkv")
            key = raw_key
            if f"{attention}.q_norm.weight" in self.weights:
                query = self.vision_norm(f"{attention}.q_norm", query)
                key = self.vision_norm(f"{attention}.k_norm", key)
            q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (query, key, value))
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            weights = scores.softmax(-1)
            y = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
            y = self.linear(f"{attention}.projection_layer", y)
            x = x + y * self.weights[f"{name}.lambda_1"]
            y = self.linear(f"{name}.mlp.fc1", self.vision_norm(f"{name}.layernorm_after", x))
            y = self.linear(f"{name}.mlp.fc2", F.gelu(y))
            x = x + y * self.weights[f"{name}.lambda_2"]
            layer += 1
        return Tile(x[1:], weights[:, 0, 1:].sum(0), raw_key[1:])

    def vision_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if bias is None:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(n, 4 * C) -> (n, H)."""
        name = "model.multi_modal_projector"
        y = self.linear(f"{name}.linear_1", self.norm(f"{name}.layer_norm", features))
        return self.linear(f"{name}.linear_2", F.gelu(y))


_NAMES_IN_TRANSFORMERS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("mlp1.0", "model.multi_modal_projector.layer_norm"),
    ("mlp1.1", "model.multi_modal_projector.linear_1"),
    ("mlp1.3", "model.multi_modal_projector.linear_2"),
    ("vision_model.", "model.vision_tower."),
    ("class_embedding", "cls_token"),
    ("patch_embedding.", "patch_embeddings.projection."),
    ("position_embedding", "position_embeddings"),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls", ".lambda_"),
)


class DenseInternVLChat(DenseInternVL):
    """InternVL in its published form; its decoder is Qwen2."""

    settings = PruningSettings(decoder_signal="keys")

    def __init__(
        self,
        path: Path,
        boundaries: tuple[int, int],
        *,
        renumber_deep: bool = False,
        selector: str = "vitcop",
        signal: str | None = None,
    ):
        self.signal = signal or self.settings.decoder_signal
        values = json.loads((path / "config.json").read_text())
        self.config = SimpleNamespace(text_config=Qwen2Config(**values["llm_config"]))
        self.boundaries, self.renumber_deep, self.selector = boundaries, renumber_deep, selector
        tokens = json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        (self.image_token,) = (t["id"] for t in tokens if t["content"] == "<IMG_CONTEXT>")
        self.weights = {}
        for name, weight in load_file(path / "model.safetensors").items():
            for old, new in _NAMES_IN_TRANSFORMERS:
                name = name.replace(old, new)
            if ".qkv." not in name:
                self.weights[name] = weight
                continue
            for part, of_part in zip("qkv", weight.chunk(3), strict=True):
                self.weights[name.replace("qkv", f"{part}_proj")] = of_part
        self.set_axes()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        rows, columns = INTERNVL_CHAT.tiles(*image.size)
        tile = INTERNVL_CHAT.tile_size
        image = image.convert("RGB")
        whole = image.resize((columns * tile, rows * tile))
        tiles = [
            whole.crop((left, top, left + tile, top + tile))
            for top in range(0, rows * tile, tile)
            for left in range(0, columns * tile, tile)
        ]
        if len(tiles) > 1:
            tiles.append(image.resize((tile, tile)))
        arrays = [(np.asarray(part, dtype=np.float32) / 255 - MEAN) / STD for part in tiles]
        return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2)
