"""Model shapes of the bench, and the differences between model families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import (
    internvl_checkpoint,
    llava_next_checkpoint,
    llava_onevision_checkpoint,
    qwen3_checkpoint,
    qwen_checkpoint,
)
from benchmarks.checkpoint import AnySizeShape
from benchmarks.internvl_checkpoint import InternVLShape, save_random_internvl
from benchmarks.llava_next_checkpoint import LlavaNextShape, save_random_llava_next
from benchmarks.llava_onevision_checkpoint import LlavaOnevisionShape, save_random_llava_onevision
from benchmarks.qwen3_checkpoint import Qwen3Shape, save_random_qwen3
from benchmarks.qwen_checkpoint import QwenShape, save_random_qwen
from vitcop_vllm.demo.checkpoint import (
    DEMO,
    LLAVA_1_5_7B,
    LLAVA_1_5_13B,
    SMALL,
    LlavaShape,
    save_config,
    save_random_llava,
)

Shape = LlavaShape
"""Shapes of all families have LLaVA-1.5's sizes, and some have more."""

SHAPES: dict[str, Shape] = {
    "demo": DEMO,
    "small": SMALL,
    "llava-1.5-7b": LLAVA_1_5_7B,
    "llava-1.5-13b": LLAVA_1_5_13B,
    "llava-next-small": llava_next_checkpoint.SMALL,
    "llava-onevision-small": llava_onevision_checkpoint.SMALL,
    "internvl-small": internvl_checkpoint.SMALL,
    "qwen2.5-vl-small": qwen_checkpoint.SMALL,
    "qwen3-vl-small": qwen3_checkpoint.SMALL,
}
PUBLISHED = {"llava-1.5-7b", "llava-1.5-13b"}
"""Shapes too large to write random weights: they get vLLM's dummy weights."""

SIZE_STEP = 28
"""Pixels between the sizes that :func:`scaled_down_size` chooses from."""


@dataclass(frozen=True)
class Family:
    """What the bench knows of a model family.

    Attributes:
        name: Name in reports.
        save: Writes a checkpoint with random weights; gets a folder, a shape and ``dtype``.
        image_marker: Marks an image in a prompt's text.
        image_sizes: Height and width in pixels of the bench's images; empty if the encoder takes
            one size only.
        video_marker: Marks a video in a prompt's text; empty if the bench sends none.
    """

    name: str
    save: Callable[..., None]
    image_marker: str = "<image>"
    image_sizes: tuple[int, ...] = ()
    video_marker: str = ""


_QWEN = (qwen_checkpoint.IMAGE_MARKER, (448, 1344), qwen_checkpoint.VIDEO_MARKER)

FAMILIES: dict[type[Shape], Family] = {
    LlavaShape: Family("LLaVA-1.5", save_random_llava),
    LlavaNextShape: Family("LLaVA-NeXT", save_random_llava_next, image_sizes=(672,)),
    LlavaOnevisionShape: Family("LLaVA-OneVision", save_random_llava_onevision, image_sizes=(768,)),
    InternVLShape: Family(
        "InternVL", save_random_internvl, internvl_checkpoint.IMAGE_MARKER, (1344,)
    ),
    QwenShape: Family("Qwen2.5-VL", save_random_qwen, *_QWEN),
    Qwen3Shape: Family("Qwen3-VL", save_random_qwen3, *_QWEN),
}


def family_of(shape: Shape) -> Family:
    return FAMILIES[type(shape)]


def boundaries(shape: Shape) -> dict[str, int]:
    """Pruning settings for the shape's own boundaries, if any."""
    if not isinstance(shape, AnySizeShape) or shape.boundaries is None:
        return {}
    shallow, deep = shape.boundaries
    return {"shallow_boundary": shallow, "deep_boundary": deep}


def scaled_down_size(shape: AnySizeShape, visual_tokens: float) -> int:
    """Height and width in pixels of the square image with closest to ``visual_tokens`` tokens."""
    sizes = range(SIZE_STEP, shape.image_size + 1, SIZE_STEP)
    return min(sizes, key=lambda size: abs(shape.tokens_of(size, size) - visual_tokens))


def describe(shape: Shape) -> str:
    """A shape's model family and sizes."""
    return (
        f"{family_of(shape).name}'s form, {shape.layers} decoder layers of width {shape.hidden}, "
        f"{shape.vision_layers} encoder layers of width {shape.vision_hidden}"
    )


def write_checkpoint(path: Path, shape: Shape, options: Mapping[str, Any]) -> None:
    """Write a random checkpoint.

    Args:
        path: Its folder.
        shape: The model's shape; prompts may have up to ``max_model_len`` tokens.
        options: Arguments of ``vllm.LLM``.
    """
    shape = replace(shape, max_positions=max(shape.max_positions, options["max_model_len"]))
    if options.get("load_format") == "dummy" and not isinstance(shape, AnySizeShape):
        save_config(path, shape)
    else:
        family_of(shape).save(path, shape, dtype=options["dtype"])
