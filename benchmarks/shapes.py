"""Model shapes of the bench, and the differences between model families."""

from pathlib import Path

from benchmarks import llava_next_checkpoint, qwen3_checkpoint, qwen_checkpoint
from benchmarks.llava_next_checkpoint import LlavaNextShape, save_random_llava_next
from benchmarks.qwen3_checkpoint import Qwen3Shape, save_random_qwen3
from benchmarks.qwen_checkpoint import QwenShape, QwenVLShape, save_random_qwen
from vitcop_vllm.demo.checkpoint import (
    DEMO,
    LLAVA_1_5_7B,
    LLAVA_1_5_13B,
    SMALL,
    LlavaShape,
    save_config,
    save_random_llava,
)

Shape = LlavaShape | QwenVLShape

SHAPES: dict[str, Shape] = {
    "demo": DEMO,
    "small": SMALL,
    "llava-1.5-7b": LLAVA_1_5_7B,
    "llava-1.5-13b": LLAVA_1_5_13B,
    "llava-next-small": llava_next_checkpoint.SMALL,
    "qwen2.5-vl-small": qwen_checkpoint.SMALL,
    "qwen3-vl-small": qwen3_checkpoint.SMALL,
}
PUBLISHED = {"llava-1.5-7b", "llava-1.5-13b"}
"""Shapes too large to write random weights: they get vLLM's dummy weights."""


def image_marker(shape: Shape) -> str:
    """Marks an image in a prompt's text."""
    return qwen_checkpoint.IMAGE_MARKER if isinstance(shape, QwenVLShape) else "<image>"


def boundaries(shape: Shape) -> dict[str, int]:
    """Pruning settings for the shape's own boundaries, if any."""
    if not isinstance(shape, QwenVLShape) or shape.boundaries is None:
        return {}
    shallow, deep = shape.boundaries
    return {"shallow_boundary": shallow, "deep_boundary": deep}


def describe(shape: Shape) -> str:
    """A shape's model family and sizes."""
    families = {QwenShape: "Qwen2.5-VL", Qwen3Shape: "Qwen3-VL", LlavaNextShape: "LLaVA-NeXT"}
    family = families.get(type(shape), "LLaVA-1.5")
    return (
        f"{family}'s form, {shape.layers} decoder layers of width {shape.hidden}, "
        f"{shape.vision_layers} encoder layers of width {shape.vision_hidden}"
    )


def save_checkpoint(path: Path, shape: Shape, dtype: str, *, weights: bool) -> None:
    """Write a random checkpoint; without ``weights``, for vLLM's dummy weights."""
    if isinstance(shape, QwenShape):
        save_random_qwen(path, shape, dtype=dtype)
    elif isinstance(shape, Qwen3Shape):
        save_random_qwen3(path, shape, dtype=dtype)
    elif isinstance(shape, LlavaNextShape):
        save_random_llava_next(path, shape, dtype=dtype)
    else:
        assert isinstance(shape, LlavaShape)
        if weights:
            save_random_llava(path, shape, dtype=dtype)
        else:
            save_config(path, shape)
