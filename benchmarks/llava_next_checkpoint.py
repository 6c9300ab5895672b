"""Writes LLaVA-NeXT checkpoints with random weights, for tests and for measurements of speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitcop_vllm.demo.checkpoint import (
    CHAT_TEMPLATE,
    FEATURE_LAYER,
    LlavaShape,
    save_random_weights,
)
from vitcop_vllm.demo.tokenizer import byte_tokenizer


@dataclass(frozen=True, kw_only=True)
class LlavaNextShape(LlavaShape):
    """Sizes of a LLaVA-NeXT model, whose decoder is Mistral's.

    ``image_size`` is the height and width of the bench's images.

    Attributes:
        tile_size: Height and width of a tile in pixels.
        pinpoints: (height, width) in pixels that an image may be scaled to: whole tiles of
            ``tile_size``.
        boundaries: ``shallow_boundary`` and ``deep_boundary`` of pruning, if not the default.
    """

    tile_size: int = 336
    pinpoints: tuple[tuple[int, int], ...]
    boundaries: tuple[int, int] | None = None

    @property
    def visual_tokens(self) -> int:
        return self.tokens_of(self.image_size, self.image_size)

    def tokens_of(self, width: int, height: int) -> int:
        """V, number of visual tokens of an image of that size."""
        return sum(rows * (columns + marks) for rows, columns, marks in self.grids(width, height))

    def grids(self, width: int, height: int) -> list[tuple[int, int, bool]]:
        """Rows, columns and row marks of the grids of an image of that size."""
        from transformers.image_processing_utils import select_best_resolution

        side = self.tile_size // self.patch_size
        tall, wide = select_best_resolution((height, width), [*map(list, self.pinpoints)])
        rows, columns = tall // self.tile_size * side, wide // self.tile_size * side
        # The image keeps its aspect ratio, is centred, and padding is cut off: patches without any
        # part of the image, as far as they lie in pairs on both sides.
        if width / height > wide / tall:
            rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
        return [(side, side, False), (rows, columns if rows else 0, True)]


TINY = LlavaNextShape(
    tile_size=112,
    image_size=224,
    pinpoints=((112, 224), (224, 112), (224, 224), (336, 112), (112, 336)),
    vision_hidden=64,
    vision_layers=3,
    vision_heads=2,
    hidden=128,
    layers=8,
    heads=4,
    kv_heads=2,
    intermediate=256,
)
"""64 visual tokens of a tile, at most 336 of an image, for tests and soak runs."""

SMALL = LlavaNextShape(
    image_size=672,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    vision_hidden=256,
    vision_layers=8,
    vision_heads=4,
    hidden=512,
    layers=32,
    heads=8,
    kv_heads=2,
    intermediate=1536,
)
"""Small enough for a CPU; tiles and the decoder's depth are those of the 7B models."""


def save_random_llava_next(
    path: Path, shape: LlavaNextShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import LlavaNextForConditionalGeneration

    config = _config(shape)
    config.save_pretrained(path)
    _save_processor(path, shape)
    save_random_weights(path, lambda: LlavaNextForConditionalGeneration(config), seed, dtype)


def _save_processor(path: Path, shape: LlavaNextShape) -> None:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side = {"height": shape.tile_size, "width": shape.tile_size}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": shape.tile_size},
            crop_size=side,
            image_grid_pinpoints=[*map(list, shape.pinpoints)],
        ),
        tokenizer=byte_tokenizer(),
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


def _config(shape: LlavaNextShape) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

    vocabulary = byte_tokenizer().get_vocab()
    return LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        vision_config=CLIPVisionConfig(image_size=shape.tile_size, **shape.vision_sizes()),
        text_config=MistralConfig(
            architectures=["MistralForCausalLM"],
            sliding_window=None,
            **shape.decoder_sizes(vocabulary),
        ),
        image_token_index=vocabulary["<image>"],
        image_grid_pinpoints=[*map(list, shape.pinpoints)],
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
