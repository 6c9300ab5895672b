"""Shapes of models that the bench times, and how families differ for it."""

from pathlib import Path

from benchmarks import llava_next_checkpoint, qwen_checkpoint
from benchmarks.llava_next_checkpoint import LlavaNextShape, save_random_llava_next
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

Shape = LlavaShape | QwenShape

SHAPES: dict[str, Shape] = {
    "demo": DEMO,
    "small": SMALL,
    "llava-1.5-7b": LLAVA_1_5_7B,
    "llava-1.5-13b": LLAVA_1_5_13B,
    "llava-next-small": llava_next_checkpoint.SMALL,
    "qwen2.5-vl-small": qwen_checkpoint.SMALL,
}
PUBLISHED = {"llava-1.5-7b", "llava-1.5-13b"}
"""Shapes too large to write random weights of: vLLM makes them up (dummy)."""


def image_marker(shape: Shape) -> str:
    """The text of an image in a prompt."""
    return qwen_checkpoint.IMAGE_MARKER if isinstance(shape, QwenShape) else "<image>"


def boundaries(shape: Shape) -> dict[str, int]:
    """Pruning settings for the first layers of the later stages, if a shape has its own."""
    if not isinstance(shape, QwenShape) or shape.boundaries is None:
        return {}
    shallow, deep = shape.boundaries
    return {"shallow_boundary": shallow, "deep_boundary": deep}


def describe(shape: Shape) -> str:
    """A shape's form and size, in a sentence."""
    forms = {QwenShape: "Qwen2.5-VL", LlavaNextShape: "LLaVA-NeXT"}
    form = forms.get(type(shape), "LLaVA-1.5")
    return (
        f"{form}'s form, {shape.layers} decoder layers of width {shape.hidden}, "
        f"{shape.vision_layers} encoder layers of width {shape.vision_hidden}"
    )


def save_checkpoint(path: Path, shape: Shape, dtype: str, *, weights: bool) -> None:
    """Write a random checkpoint; without ``weights``, enough for vLLM to make them up."""
    if isinstance(shape, QwenShape):
        save_random_qwen(path, shape, dtype=dtype)
    elif isinstance(shape, LlavaNextShape):
        save_random_llava_next(path, shape, dtype=dtype)
    elif weights:
        save_random_llava(path, shape, dtype=dtype)
    else:
        save_config(path, shape)
