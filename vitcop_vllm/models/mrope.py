"""M-RoPE positions of a prompt with pruned images and videos: the part that the host computes.

Only the device knows which tokens of an image are kept. The host gives all tokens of a pruned image
the position at which the image begins. The device adds each token's row and column, which travel as
columns of the embeddings. Text after an image has the same positions as without pruning. So
positions depend on the prefix only, and prefix caching stays exact.

A frame of a video is an image. Frames without text between them begin at the same row and column,
and differ in time.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch


class MRoPEImage(NamedTuple):
    """An image, or a frame of a video, in a prompt.

    Attributes:
        offset: Index of its first token in the prompt.
        num_tokens: Number of its tokens in the prompt.
        rows, columns: Grid of its visual tokens without pruning.
        is_whole: Whether all tokens of the grid are in the prompt. The host then knows the row
            and column of each.
        time: Position of its tokens in time, relative to the position at which it begins.
        advance: Number of positions from its first position to that of what follows it; ``None``:
            its larger side.
    """

    offset: int
    num_tokens: int
    rows: int
    columns: int
    is_whole: bool
    time: int = 0
    advance: int | None = None

    @property
    def extent(self) -> int:
        """Number of positions from the image's first position to that of what follows it."""
        return max(self.rows, self.columns) if self.advance is None else self.advance


def adjacent_frames(frames: Sequence[MRoPEImage], times: Sequence[int]) -> list[MRoPEImage]:
    """Frames of a video that follow each other without text, at their positions in time.

    Args:
        frames: The frames at time 0, of equal grids.
        times: Position of each frame in time, relative to the first; ascending.
    """
    placed = [
        frame._replace(time=time, advance=0) for frame, time in zip(frames, times, strict=True)
    ]
    last = placed[-1]
    return [*placed[:-1], last._replace(advance=max(times[-1] + 1, last.rows, last.columns))]


def mrope_positions(num_tokens: int, images: Iterable[MRoPEImage]) -> tuple[torch.Tensor, int]:
    """Positions (time, row, column) of a prompt's tokens.

    All tokens of a pruned image have the position at which the image begins.

    Args:
        num_tokens: N, tokens of the prompt.
        images: Images in prompt order.

    Returns:
        (3, N) int64 positions, and the difference between position and index of later tokens.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for image in images:
        text = image.offset - token
        positions[:, token : image.offset] = np.arange(position, position + text)
        position += text
        token = image.offset + image.num_tokens
        positions[:, image.offset : token] = position
        positions[0, image.offset : token] += image.time
        if image.is_whole:
            places = np.indices((image.rows, image.columns)).reshape(2, -1)
            positions[1:, image.offset : token] += places
        position += image.extent
    text = num_tokens - token
    positions[:, token:] = np.arange(position, position + text)
    return torch.from_numpy(positions), position + text - num_tokens


def positions_beyond_tokens(images: Iterable[MRoPEImage]) -> int:
    """An upper bound on position minus index of any token of a prompt."""
    return sum(max(0, image.extent - image.num_tokens) for image in images)
