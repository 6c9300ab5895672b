"""Tiny shapes of the model families, for tests and soak runs."""

from typing import Any

from benchmarks.internvl_checkpoint import InternVLShape
from benchmarks.llava_next_checkpoint import LlavaNextShape
from benchmarks.llava_onevision_checkpoint import LlavaOnevisionShape, all_pinpoints
from benchmarks.qwen3_checkpoint import Qwen3Shape
from benchmarks.qwen_checkpoint import QwenShape

_TOWER: dict[str, Any] = {"vision_hidden": 64, "vision_layers": 3, "vision_heads": 2}
_DECODER: dict[str, Any] = {"hidden": 128, "layers": 8, "heads": 4, "kv_heads": 2}
_SIZES = {**_TOWER, **_DECODER, "intermediate": 256}

# A low base: every frequency then notices a wrong position.
_SMALL_MLP_AND_BASE: dict[str, Any] = {"vision_intermediate": 128, "rope_theta": 100.0}

LLAVA_NEXT = LlavaNextShape(
    tile_size=112,
    image_size=224,
    pinpoints=((112, 224), (224, 112), (224, 224), (336, 112), (112, 336)),
    **_SIZES,
)
"""64 visual tokens of a tile, at most 336 of an image."""

LLAVA_ONEVISION = LlavaOnevisionShape(
    tile_size=70, image_size=224, pinpoints=all_pinpoints(70), **_SIZES
)
"""25 visual tokens of a tile and up to 36 tiles, more than nine of which are scaled down; 9 visual
tokens of a video's frame."""

QWEN = QwenShape(
    **(_SIZES | _SMALL_MLP_AND_BASE | {"vision_layers": 4}),
    max_visual_tokens=320,
    window=3,  # most grids end in partial windows
    full_attention=(1, 3),
)

QWEN3 = Qwen3Shape(
    **(_SIZES | _SMALL_MLP_AND_BASE | {"vision_layers": 4, "heads": 6}),
    max_visual_tokens=320,
    deepstack=(0, 2),
    learned_side=7,  # images have other sides, so all positions are interpolated
    head_size=32,  # heads * head_size differs from hidden
    boundaries=(2, 6),
)

QWEN3_MOE = Qwen3Shape(
    **(_SIZES | _SMALL_MLP_AND_BASE | {"intermediate": 64}),
    max_visual_tokens=320,
    deepstack=(1, 2),  # the last layer among them
    learned_side=7,
    head_size=32,
    experts=4,
    boundaries=(2, 6),
)

INTERNVL_CHAT = InternVLShape(
    tile_size=140,  # an odd number of visual tokens per side
    max_tiles=9,
    **_SIZES,
    **_SMALL_MLP_AND_BASE,
)
"""25 visual tokens of a tile, at most 250 of an image."""

INTERNVL = InternVLShape(
    tile_size=140, max_tiles=9, large_encoder=True, qwen3=True, **_SIZES, **_SMALL_MLP_AND_BASE
)
