"""M-RoPE positions of a prompt whose images are pruned, as far as the host knows them.

Where a kept token lies in its image is known to the device alone. The host gives all tokens of
a pruned image the position at which the image begins; the device adds rows and columns, which
travel as columns of the embeddings. Text after an image stands where it stands unpruned, so
positions are a function of the prefix and prefix caching stays exact.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch


class MRoPEImage(NamedTuple):
    """An image in a prompt.

    Attributes:
        offset: Index of its first token in the prompt.
        num_tokens: Its tokens in the prompt.
        rows, columns: Grid of its tokens, if unpruned.
        is_whole: Whether all tokens of the grid are in the prompt; the host then knows where
            each lies.
    """

    offset: int
    num_tokens: int
    rows: int
    columns: int
    is_whole: bool

    @property
    def extent(self) -> int:
        """Positions that the image takes: text after it begins so far from its first."""
        return max(self.rows, self.columns)


def mrope_positions(num_tokens: int, images: Iterable[MRoPEImage]) -> tuple[torch.Tensor, int]:
    """Positions (time, row, column) of a prompt, without the places of pruned images' tokens.

    Args:
        num_tokens: N, of the prompt.
        images: In prompt order.

    Returns:
        (3, N) int64; and what to add to a later token's index for its position.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token = position = 0
    for image in images:
        text = image.offset - token
        positions[:, token : image.offset] = np.arange(position, position + text)
        position += text
        token = image.offset + image.num_tokens
        positions[:, image.offset : token] = position
        if image.is_whole:
            places = np.indices((image.rows, image.columns)).reshape(2, -1)
            positions[1:, image.offset : token] += places
        position += image.extent
    text = num_tokens - token
    positions[:, token:] = np.arange(position, position + text)
    return torch.from_numpy(positions), position + text - num_tokens


def positions_beyond_tokens(images: Iterable[MRoPEImage]) -> int:
    """An upper bound on how far any position of a prompt lies past its token's index."""
    return sum(max(0, image.extent - image.num_tokens) for image in images)
