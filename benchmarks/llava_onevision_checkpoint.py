"""Writes LLaVA-OneVision checkpoints with random weights, for tests and for benches."""

from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path

from benchmarks.checkpoint import SMALL_SIZES, save_model
from benchmarks.llava_next_checkpoint import LlavaNextShape
from vitcop_vllm.demo.checkpoint import CHAT_TEMPLATE, random_matrix
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
        ratio = sqrt(rows * columns / (MOST_TILES * self.tile_side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return [base, (rows, columns, marks)]

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame of a video."""
        return ceil(self.tile_side / 2) ** 2


def all_pinpoints(tile_size: int) -> tuple[tuple[int, int], ...]:
    """As published: every size of up to 6 by 6 tiles."""
    return tuple(
        (tile_size * rows, tile_size * cols) for rows in range(1, 7) for cols in range(1, 7)
    )


SMALL = LlavaOnevisionShape(
    tile_size=384,
    image_size=768,
    pinpoints=all_pinpoints(384),
    layers=28,
    **SMALL_SIZES,
    boundaries=(2, 20),  # as in configs/llava-onevision-7b.yaml
)
"""Small enough for a CPU; tiles and the decoder's depth are those of the 7B model."""


def save_random_llava_onevision(
    path: Path, shape: LlavaOnevisionShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    pinpoints = [*map(list, shape.pinpoints)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=shape.tile_size, **shape.vision_sizes(), vision_use_head=False
        ),
        text_config=Qwen2Config(
            architectures=["Qwen2ForCausalLM"], **shape.decoder_sizes(tokenizer)
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
        tie_word_embeddings=False,
    )
    side = {"height": shape.tile_size, "width": shape.tile_size}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=shape.tile_side**2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE.replace(_TEXT_PART, _VIDEO_PART + _TEXT_PART),
    ).save_pretrained(path)
    save_model(path, LlavaOnevisionForConditionalGeneration, config, seed, dtype, random_matrix)
