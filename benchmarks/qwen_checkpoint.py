"""Random Qwen2.5-VL checkpoints, loadable by transformers and vLLM.

The architecture is the real one: a vision tower with windowed and full attention, a 2x2 merger, a
decoder with M-RoPE and grouped-query heads, a chat template, and a processor for images and videos.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import (
    SMALL_SIZES,
    AnySizeShape,
    byte_tokenizer,
    chat_template,
    save_model,
)

IMAGE_MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
"""Marks an image in a prompt's text."""

VIDEO_MARKER = IMAGE_MARKER.replace("image", "video")

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

MERGE = 2
"""Patches along a side of a visual token."""


@dataclass(frozen=True, kw_only=True)
class QwenVLShape(AnySizeShape):
    """Sizes of a Qwen-VL model.

    Attributes:
        min_visual_tokens, max_visual_tokens: Limits that images are scaled to.
    """

    image_size: int = 448
    rope_theta: float = 1_000_000.0
    min_visual_tokens: int = 4
    max_visual_tokens: int

    @property
    def token_side(self) -> int:
        """Pixels along a side of a visual token."""
        return self.patch_size * MERGE

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies of time, row and column."""
        # As in Qwen: a quarter of the frequencies for time, the rest for row and column.
        frequencies = self.hidden // self.heads // 2
        of_time = frequencies // 4
        of_row = (frequencies - of_time) // 2
        return [of_time, of_row, frequencies - of_time - of_row]

    def vision_sizes(self) -> dict[str, int]:
        return {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_heads": self.vision_heads,
            "patch_size": self.patch_size,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": self.hidden,
        }

    def decoder_sizes(self, tokenizer: Any, vocabulary_size: int = 0) -> dict[str, Any]:
        sizes = super().decoder_sizes(tokenizer, vocabulary_size) | {"rms_norm_eps": 1e-6}
        sizes["rope_parameters"]["mrope_section"] = self.mrope_section
        return sizes

    @property
    def pixel_limits(self) -> dict[str, int]:
        """Limits on the pixels of a scaled image, with the processor's names."""
        pixels = self.token_side**2
        least, most = self.min_visual_tokens * pixels, self.max_visual_tokens * pixels
        return {"shortest_edge": least, "longest_edge": most}

    def tokens_of(self, width: int, height: int) -> int:
        rows, columns = self.grid(width, height)
        return rows * columns

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of visual tokens for an image size."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        side = self.token_side
        height, width = smart_resize(height, width, side, *self.pixel_limits.values())
        return height // side, width // side


@dataclass(frozen=True, kw_only=True)
class QwenShape(QwenVLShape):
    """Sizes of a Qwen2.5-VL model.

    Attributes:
        window: Visual tokens along a side of an attention window.
        full_attention: Vision layers that attend over the whole image, the last layer among them.
    """

    window: int = 4
    full_attention: tuple[int, ...]

    def vision_config(self) -> dict[str, Any]:
        return {
            **self.vision_sizes(),
            "window_size": self.window * self.token_side,
            "fullatt_block_indexes": [*self.full_attention],
        }


SMALL = QwenShape(
    max_visual_tokens=2400,
    vision_intermediate=640,
    full_attention=(7,),
    layers=28,
    **SMALL_SIZES,
    boundaries=(2, 20),  # as in configs/qwen2.5-vl-7b.yaml
    image_size=1344,
)
"""Small enough for a CPU. The decoder's depth and the encoder's share of a prefill are about those
of the 7B model: an eighth of the vision layers attend over the whole image."""


def save_random_qwen(
    path: Path, shape: QwenShape, *, seed: int = 0, dtype: str = "float32"
) -> None:
    """Write a checkpoint with seeded random weights of a torch ``dtype``."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = byte_tokenizer(SPECIALS)
    config = Qwen2_5_VLConfig(
        vision_config=shape.vision_config(),
        text_config=shape.decoder_sizes(tokenizer),
        **token_ids(tokenizer),
    )
    save_processor(path, shape, tokenizer, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    save_model(path, Qwen2_5_VLForConditionalGeneration, config, seed, dtype)


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """Arguments of a Qwen-VL's configuration: its named tokens, and that none are tied."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def save_processor(
    path: Path,
    shape: QwenVLShape,
    tokenizer: Any,
    processor: Any,
    video_processor: Any,
    template: str = chat_template(IMAGE_MARKER, VIDEO_MARKER),
) -> None:
    """Write the files of a Qwen-VL's processor.

    Args:
        path: Folder of the checkpoint.
        shape: Its patches, and its limits on the size of images.
        tokenizer: The model's tokenizer.
        processor, video_processor: Classes of transformers.
        template: The model's prompts.
    """
    from transformers import Qwen2VLImageProcessor

    sizes = {"patch_size": shape.patch_size, "size": shape.pixel_limits}
    processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=video_processor(**sizes),
        chat_template=template,
    ).save_pretrained(path)
