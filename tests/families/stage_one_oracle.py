"""Models that Stage I alone prunes, as one dense forward: transformers' decoder on kept tokens.

The towers are transformers' too. What attention the tokens of an image receive is computed here.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel

from tests.families.qwen3_oracle import DenseQwen3
from tests.families.qwen_oracle import attention_received
from tests.pruning import oracle
from vitcop_vllm.pruning.plan import VisualTokenCounts


class StageOneOracle:
    """A whole model in float32.

    Attributes:
        image_token: Id of the placeholder token.
    """

    image_token: int

    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        self.model.eval()
        self.processor: Any = AutoProcessor.from_pretrained(path)
        self.config: Any = self.model.config

    def visual_tokens(self, image: Image.Image) -> int:
        """V."""
        raise NotImplementedError

    def encode(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """(V, H) embeddings of all tokens, and (V,) attention that they receive."""
        raise NotImplementedError

    def places(self, kept: list[int], image: Image.Image) -> tuple[list[tuple[int, ...]], int]:
        """Rotary positions of kept tokens, relative to the image's start, and its extent."""
        return [(i,) * 3 for i in range(len(kept))], len(kept)

    @torch.no_grad()
    def logits(
        self,
        tokens: list[int],
        images: list[Image.Image],
        counts: list[VisualTokenCounts],
        prompt_length: int,
        chosen: list[list[int]] | None = None,
    ) -> torch.Tensor:
        """(1 + answer tokens, vocabulary); ``chosen`` replaces the oracle's own selection."""
        embeds = self.model.get_input_embeddings()(torch.tensor(tokens))
        positions: list[tuple[int, ...]] = []
        position = 0
        for number, (image, planned) in enumerate(zip(images, counts, strict=True)):
            start = tokens.index(self.image_token, len(positions))
            before = start - len(positions)
            positions += self._text(position, before)
            position += before
            whole, received = self.encode(image)
            kept = (
                chosen[number] if chosen else oracle.largest(received.tolist(), planned.stages[0])
            )
            embeds[start : start + len(kept)] = whole[kept]
            offsets, extent = self.places(kept, image)
            positions += [tuple(position + offset for offset in place) for place in offsets]
            position += extent
        positions += self._text(position, len(tokens) - len(positions))
        return self.decode(embeds[None], torch.tensor(positions).T)[0, prompt_length - 1 :]

    def _text(self, position: int, count: int) -> list[tuple[int, ...]]:
        return [(position + i,) * 3 for i in range(count)]

    def decode(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(1, T, vocabulary) logits of (1, T, H) embeddings at (3, T) positions."""
        text = self.model.model.language_model
        hidden = text(
            inputs_embeds=embeds, position_ids=self.decoder_positions(positions)
        ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits

    def decoder_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Of (3, T) positions, those that the decoder takes: (1, T), as all three are equal."""
        return positions[:1]


class Gemma3(StageOneOracle):
    """Gemma 3: a token is an average over a square of SigLIP's patches."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.image_token = self.config.image_token_index

    def visual_tokens(self, image: Image.Image) -> int:
        return int(self.config.mm_tokens_per_image)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        tower = self.model.model.vision_tower
        pixels = self.processor.image_processor(image.convert("RGB"), return_tensors="pt")
        layer = (
            tower.vision_model.encoder.layers[-1]
            if hasattr(tower, "vision_model")
            else (tower.encoder.layers[-1])
        )
        captured = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        features = tower(pixel_values=pixels["pixel_values"]).last_hidden_state
        hook.remove()
        attention = layer.self_attn
        normed = layer.layer_norm1(captured[0])[0]
        heads = self.config.vision_config.num_attention_heads
        query, key = (
            self.by_token(project(normed)).unflatten(-1, (heads, -1))
            for project in (attention.q_proj, attention.k_proj)
        )
        embeddings = self.model.model.multi_modal_projector(features)[0]
        return embeddings, attention_received(query, key)

    def by_token(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, C), row by row, to (V, patches of a token, C)."""
        side = round(len(patches) ** 0.5)
        tokens = round(self.config.mm_tokens_per_image**0.5)
        square = side // tokens
        grid = patches.view(tokens, square, tokens, square, -1)
        return grid.transpose(1, 2).reshape(tokens**2, square**2, -1)


class _Tower(DenseQwen3):
    """The encoder of Qwen3.5: that of Qwen3-VL without deepstack."""

    tower_class = Qwen3_5VisionModel

    def __init__(self, path: Path) -> None:
        super().__init__(path, (1, 2))
        self.tower = self.load_tower(path)

    @property
    def levels(self) -> list[int]:
        return []

    def load_tower(self, path: Path) -> Any:
        self.weights = {name: weight.float() for name, weight in self.weights.items()}
        return super().load_tower(path)


class _MoeTower(_Tower):
    tower_class = Qwen3_5MoeVisionModel


class Qwen35(StageOneOracle):
    """Qwen3.5."""

    tower_of: type[_Tower] = _Tower

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.image_token = self.config.image_token_id
        self.tower = self.tower_of(path)

    def visual_tokens(self, image: Image.Image) -> int:
        return self.tower.visual_tokens(image)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        tower = self.tower
        _, grid = tower.processed(image)
        x = tower.last_block_input(tower.frame_of(image))
        name = f"model.visual.blocks.{self.config.vision_config.depth - 1}"
        query, key, value = tower.query_key_value(name, x)
        query, key = (tower.turn(t, grid) for t in (query, key))
        whole = tower.merge_patches(tower.rest_of_block(name, x, query, key, value))
        return whole, attention_received(query, key)

    def places(self, kept: list[int], image: Image.Image) -> tuple[list[tuple[int, ...]], int]:
        _, (rows, columns) = self.tower.processed(image)
        return [(0, token // columns, token % columns) for token in kept], max(rows, columns)

    def decoder_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions[:, None]


class Qwen35Moe(Qwen35):
    """Qwen3.5-MoE."""

    tower_of = _MoeTower


class Mistral3(StageOneOracle):
    """Mistral3: a token is a square of Pixtral's patches. A pruned image has no row marks."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.image_token = self.config.image_token_id

    def visual_tokens(self, image: Image.Image) -> int:
        rows, columns = self.grid(self.processed(image)[1])
        return rows * columns

    def processed(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """The pixels, and their height and width."""
        merge, patch = self.config.spatial_merge_size, self.config.vision_config.patch_size
        processed = self.processor.image_processor(
            image.convert("RGB"), patch_size=merge * patch, return_tensors="pt"
        )
        height, width = map(int, processed["image_sizes"][0])
        return processed["pixel_values"], (height, width)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        side = self.config.spatial_merge_size * self.config.vision_config.patch_size
        return size[0] // side, size[1] // side

    @torch.no_grad()
    def encode(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, size = self.processed(image)
        tower = self.model.model.vision_tower
        attention = tower.transformer.layers[-1].attention
        captured: dict[str, Any] = {}

        def capture(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)

        hook = attention.register_forward_pre_hook(capture, with_kwargs=True)
        features = tower(pixels, image_sizes=[size]).last_hidden_state[0]
        hook.remove()
        normed, (cos, sin) = captured["hidden_states"][0], captured["position_embeddings"]
        query, key = (
            self.by_token(turn(project(normed), cos, sin, attention.num_heads), size)
            for project in (attention.q_proj, attention.k_proj)
        )
        embeddings = self.model.model.multi_modal_projector(features, [size])
        return embeddings, attention_received(query, key)

    def by_token(self, patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(patches, heads, D), row by row, to (V, patches of a token, heads, D)."""
        merge = self.config.spatial_merge_size
        rows, columns = self.grid(size)
        return torch.stack(
            [
                patches[(row * merge + i) * columns * merge + column * merge + j]
                for row in range(rows)
                for column in range(columns)
                for i in range(merge)
                for j in range(merge)
            ]
        ).unflatten(0, (rows * columns, merge**2))


def turn(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """(T, heads * D) queries or keys to (T, heads, D), after rotary embedding."""
    x = rows.unflatten(-1, (heads, -1))
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.reshape(-1, 1, x.shape[-1]) + turned * sin.reshape(-1, 1, x.shape[-1])
