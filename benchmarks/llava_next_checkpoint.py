"""Writes LLaVA-NeXT checkpoints with random weights, for tests and for measurements of speed."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import SMALL_SIZES, AnySizeShape, save_model
from vitcop_vllm.demo.checkpoint import CHAT_TEMPLATE, FEATURE_LAYER, random_matrix
from vitcop_vllm.demo.tokenizer import byte_tokenizer


@dataclass(frozen=True, kw_only=True)
class LlavaNextShape(AnySizeShape):
    """Sizes of a LLaVA-NeXT model, whose decoder is Mistral's.

    Attributes:
        tile_size: Height and width of a tile in pixels.
        pinpoints: (height, width) in pixels that an image may be scaled to: whole tiles of
            ``tile_size``.
    """

    tile_size: int = 336
    pinpoints: tuple[tuple[int, int], ...]

    @property
    def tile_side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile_size // self.patch_size

    def tokens_of(self, width: int, height: int) -> int:
        return sum(rows * (columns + marks) for rows, columns, marks in self.grids(width, height))

    def grids(self, width: int, height: int) -> list[tuple[int, int, bool]]:
        """Rows, columns and row marks of the grids of an image of that size."""
        from transformers.image_processing_utils import select_best_resolution

        side = self.tile_side
        tall, wide = select_best_resolution((height, width), [*map(list, self.pinpoints)])
        rows, columns = tall // self.tile_size * side, wide // self.tile_size * side
        # The image keeps its aspect ratio, is centred, and padding is cut off: patches without any
        # part of the image, as far as they lie in pairs on both sides.
        if width / height > wide / tall:
            rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
        return [(side, side, False), (rows, columns if rows else 0, True)]


SMALL = LlavaNextShape(
    image_size=672,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    layers=32,
    **SMALL_SIZES,
)
"""Small enough for a CPU; tiles and the decoder's depth are those of the 7B models."""


def save_random_llava_next(
    path: Path, shape: LlavaNextShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a whole checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    tokenizer = byte_tokenizer()
    pinpoints = [*map(list, shape.pinpoints)]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=shape.tile_size, **shape.vision_sizes()),
        text_config=MistralConfig(
            architectures=["MistralForCausalLM"],
            sliding_window=None,
            **shape.decoder_sizes(tokenizer),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": shape.tile_size},
            crop_size={"height": shape.tile_size, "width": shape.tile_size},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    save_model(path, LlavaNextForConditionalGeneration, config, seed, dtype, random_matrix)
