"""Writes LLaVA-OneVision checkpoints with random weights, for tests and for benches."""

from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

from benchmarks.llava_next_checkpoint import LlavaNextShape
from vitcop_vllm.demo.checkpoint import CHAT_TEMPLATE, save_random_weights
from vitcop_vllm.demo.tokenizer import byte_tokenizer

_TEXT_PART = "{% if part['type'] == 'text' %}"
_VIDEO_PART = "{% if part['type'] == 'video' %}<video>\n{% endif %}"

VIDEO_TOKEN = 260
"""Id of the placeholder of videos."""

MOST_TILES = 9
"""Larger images are scaled down to about as many tiles."""


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionShape(LlavaNextShape):
    """Sizes of a LLaVA-OneVision model; its vision sizes are those of SigLIP."""

    def grids(self, width: int, height: int) -> list[tuple[int, int, bool]]:
        base, (rows, columns, marks) = super().grids(width, height)
        side = self.tile_size // self.patch_size
        ratio = sqrt(rows * columns / (MOST_TILES * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return [base, (rows, columns, marks)]

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame of a video."""
        return ceil(self.tile_size // self.patch_size / 2) ** 2


TINY = LlavaOnevisionShape(
    tile_size=70,
    image_size=224,
    pinpoints=tuple((70 * rows, 70 * columns) for rows in range(1, 7) for columns in range(1, 7)),
    vision_hidden=64,
    vision_layers=3,
    vision_heads=2,
    hidden=128,
    layers=8,
    heads=4,
    kv_heads=2,
    intermediate=256,
)
"""25 visual tokens of a tile and up to 36 tiles, more than nine of which are scaled down; 9 visual
tokens of a video's frame."""


SMALL = LlavaOnevisionShape(
    tile_size=384,
    image_size=768,
    pinpoints=tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
    vision_hidden=256,
    vision_layers=8,
    vision_heads=4,
    hidden=512,
    layers=28,
    heads=8,
    kv_heads=2,
    intermediate=1536,
    boundaries=(2, 20),  # as in configs/llava-onevision-7b.yaml
)
"""Small enough for a CPU; tiles and the decoder's depth are those of the 7B model."""


def save_random_llava_onevision(
    path: Path, shape: LlavaOnevisionShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import LlavaOnevisionForConditionalGeneration

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    config = _config(shape, tokenizer)
    config.save_pretrained(path)
    _save_processor(path, shape, tokenizer)
    save_random_weights(path, lambda: LlavaOnevisionForConditionalGeneration(config), seed, dtype)


def _save_processor(path: Path, shape: LlavaOnevisionShape, tokenizer: Any) -> None:
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    side = {"height": shape.tile_size, "width": shape.tile_size}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=side, image_grid_pinpoints=[*map(list, shape.pinpoints)]
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=(shape.tile_size // shape.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE.replace(_TEXT_PART, _VIDEO_PART + _TEXT_PART),
    ).save_pretrained(path)


def _config(shape: LlavaOnevisionShape, tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    vocabulary = tokenizer.get_vocab()
    return LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"],
        vision_config=SiglipVisionConfig(
            image_size=shape.tile_size, **shape.vision_sizes(), vision_use_head=False
        ),
        text_config=Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            **shape.decoder_sizes(vocabulary),
        ),
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
        image_grid_pinpoints=[*map(list, shape.pinpoints)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
        tie_word_embeddings=False,
    )
