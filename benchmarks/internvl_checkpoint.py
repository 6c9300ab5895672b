"""Writes InternVL checkpoints with random weights, for tests and for measurements of speed.

Their form is that of transformers, ``InternVLForConditionalGeneration``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import (
    SMALL_SIZES,
    AnySizeShape,
    byte_tokenizer,
    chat_template,
    random_weight,
    save_model,
)

IMAGE_MARKER = "<IMG_CONTEXT>\n"
"""Marks an image in a prompt's text."""

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>", "<video>"),
)


@dataclass(frozen=True, kw_only=True)
class InternVLShape(AnySizeShape):
    """Sizes of an InternVL model; 2x2 patches are a visual token.

    Attributes:
        tile_size: Height and width of a tile in pixels.
        max_tiles: Most tiles of an image, without its thumbnail.
        large_encoder: Whether the encoder is like InternViT-6B, with RMS norms also of queries and
            keys, and without biases of the attention; otherwise it is like InternViT-300M.
        qwen3: Whether the decoder is Qwen3, which normalises keys, as in InternVL3.5; otherwise it
            is Qwen2.
    """

    image_size: int = 448
    rope_theta: float = 1_000_000.0
    tile_size: int = 448
    max_tiles: int = 12
    large_encoder: bool = False
    qwen3: bool = False

    @property
    def tile_side(self) -> int:
        """Visual tokens along a side of a tile."""
        return self.tile_size // self.patch_size // 2

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for an image size."""
        from transformers.models.got_ocr2 import image_processing_got_ocr2 as got_ocr2

        tile = self.tile_size, self.tile_size
        columns, rows = got_ocr2.get_optimal_tiled_canvas((height, width), tile, 1, self.max_tiles)
        return rows, columns

    def grids(self, width: int, height: int) -> list[tuple[int, int]]:
        """Rows and columns of the tiles' visual tokens and, behind several, the thumbnail's."""
        side = self.tile_side
        rows, columns = self.tiles(width, height)
        tiles = [(rows * side, columns * side)]
        return tiles if rows * columns == 1 else [*tiles, (side, side)]

    def tokens_of(self, width: int, height: int) -> int:
        return sum(rows * columns for rows, columns in self.grids(width, height))


SMALL = InternVLShape(
    layers=28,
    **SMALL_SIZES,
    boundaries=(2, 20),  # as in configs/internvl3-8b.yaml
    image_size=1344,
)
"""Small enough for a CPU; tiles and the decoder's depth are those of InternVL3-8B."""


def save_random_internvl(
    path: Path, shape: InternVLShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVisionConfig,
        Qwen2Config,
        Qwen3Config,
    )
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    tokenizer = internvl_tokenizer()
    decoder: Any = Qwen2Config(architectures=["Qwen2ForCausalLM"], **shape.decoder_sizes(tokenizer))
    if shape.qwen3:
        decoder = Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            head_dim=shape.hidden // shape.heads,
            **shape.decoder_sizes(tokenizer),
        )
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **shape.vision_sizes(),
            image_size=shape.tile_size,
            attention_bias=not shape.large_encoder,
            use_qk_norm=shape.large_encoder,
            norm_type="rms_norm" if shape.large_encoder else "layer_norm",
            use_mean_pooling=True,
        ),
        text_config=decoder,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=shape.tile_side**2,
        tie_word_embeddings=False,
    )
    size = {"height": shape.tile_size, "width": shape.tile_size}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, max_patches=shape.max_tiles
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=shape.tile_side**2,
        chat_template=chat_template(IMAGE_MARKER),
    ).save_pretrained(path)
    save_model(path, InternVLForConditionalGeneration, config, seed, dtype, _weight)


def internvl_tokenizer() -> Any:
    tokenizer = byte_tokenizer(SPECIALS)
    tokenizer._set_model_specific_special_tokens(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    return tokenizer


def _weight(name: str, weight: Any) -> Any:
    """[CLS] and the positions, (1, N, width), have no fan-in."""
    import torch

    return torch.randn_like(weight) if weight.dim() == 3 else random_weight(name, weight)
