"""Integers that travel with an image's embeddings, as columns after them.

Wherever vLLM keeps, sends or caches the embeddings, the columns go too. They hold the bits of
the integers, because values would round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Columns(NamedTuple):
    """Which columns the embeddings of a pruned image carry.

    Attributes:
        width: H, columns of the embeddings themselves.
        labels: Whether a cluster label of each token follows.
        places: Whether the row and the column of each token in the image's grid follow.
    """

    width: int
    labels: bool
    places: bool

    def append(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None,
        index: torch.Tensor,
        num_grid_columns: int,
    ) -> torch.Tensor:
        """Embeddings of images of one grid and what travels with them.

        Args:
            embeddings: (..., n, H).
            labels: (..., n) int64 cluster labels; ``None`` without clusters.
            index: (..., n) int64 places in the images' grid, row-major.
            num_grid_columns: Columns of that grid.

        Returns:
            (..., n, H + number of columns)
        """
        integers = []
        if self.labels:
            assert labels is not None
            integers.append(labels)
        if self.places:
            integers.append(index.div(num_grid_columns, rounding_mode="floor"))
            integers.append(index.remainder(num_grid_columns))
        if not integers:
            return embeddings
        dtype = embeddings.dtype
        columns = torch.stack(integers, dim=-1).to(_BITS[dtype]).view(dtype)
        return torch.cat((embeddings, columns), dim=-1)

    def split(
        self, embeddings: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """What a step's images carry.

        Args:
            embeddings: Per image (n, H), or with columns.

        Returns:
            The embeddings alone, (n, H) each; the labels, (n,) int64 of each image that has
            columns; and (N, 2) int64 row and column of all images' tokens, 0 where an image has
            no columns, or ``None`` where none has.
        """
        plain = [one[:, : self.width] for one in embeddings]
        integers = [
            one[:, self.width :].contiguous().view(_BITS[one.dtype]).to(torch.int64)
            for one in embeddings
        ]
        labels = [columns[:, 0] for columns in integers if self.labels and columns.shape[1]]
        places = None
        if self.places and any(columns.shape[1] for columns in integers):
            places = torch.cat(
                [
                    columns[:, -2:] if columns.shape[1] else columns.new_zeros(len(columns), 2)
                    for columns in integers
                ]
            )
        return plain, labels, places
