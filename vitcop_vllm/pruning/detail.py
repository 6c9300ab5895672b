"""How much fine detail an image has, from its pixels: what a ratio of ``auto`` follows.

Text, tables and drawings have many strong edges close to each other. A large object has edges at
its border only, noise and most textures have weak edges. So a patch is *dense* if many of its
pixels differ strongly from their neighbours. This needs no model, and little time.

The thresholds separate signs from everything else in images of the demo model's world; see
docs/accuracy.md. Text of low contrast is not found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitcop_vllm.pruning.grids import Grid

PATCH_SIDE = 14
"""Pixels on each side of a patch, after the image is scaled to its grid."""

STRONG_EDGE = 0.3
"""Least difference of luminance between neighbours at a strong edge; black to white is 1."""

DENSE_EDGES = 0.2
"""Share of a patch's pixels at strong edges above which the patch is dense."""

_MOST_FRAMES = 8
"""Frames of a video that are looked at: these, evenly spaced."""

Picture = Image.Image | npt.NDArray[Any] | Any
"""What vLLM's loaders return: a PIL image, or an array or tensor with channels first or last."""


def dense_share(picture: Picture, grid: Grid) -> float:
    """Share of dense patches among all patches of an image, in [0, 1].

    Args:
        picture: The image, or a frame of a video.
        grid: Rows and columns of its visual tokens: one patch per token.
    """
    size = grid.columns * PATCH_SIDE, grid.rows * PATCH_SIDE
    # The gap makes large photographs fast: pixels are averaged in whole blocks first.
    gray = _as_image(picture).convert("L")
    luminance = np.asarray(
        gray.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.int16
    )
    strong = np.zeros(luminance.shape, dtype=bool)
    strong[:, :-1] = np.abs(np.diff(luminance, axis=1)) > 255 * STRONG_EDGE
    strong[:-1] |= np.abs(np.diff(luminance, axis=0)) > 255 * STRONG_EDGE
    rows = np.add.reduceat(strong, range(0, size[1], PATCH_SIDE), axis=0, dtype=np.uint8)
    patches = np.add.reduceat(rows, range(0, size[0], PATCH_SIDE), axis=1, dtype=np.uint8)
    return float((patches > DENSE_EDGES * PATCH_SIDE**2).mean())


def dense_share_of_frames(frames: Sequence[Picture], grid: Grid) -> float:
    """Largest :func:`dense_share` of a video's frames, of which up to eight are looked at."""
    number = min(len(frames), _MOST_FRAMES)
    chosen = np.linspace(0, len(frames) - 1, number).round().astype(int)
    return max(dense_share(frames[i], grid) for i in chosen)


def _as_image(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        # Palettes and transparency: the model gets the colours too.
        return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    pixels = np.asarray(picture)
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):  # vLLM's rule for channels
        pixels = pixels.transpose(1, 2, 0)
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = (255 * pixels.clip(0, 1)).round() if pixels.max() <= 1 else pixels.clip(0, 255)
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
