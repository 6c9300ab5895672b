"""Integers that travel with an image's embeddings, as extra columns.

vLLM stores, sends and caches the columns together with the embeddings. A column holds the bits of
the integers, because a conversion to the embeddings' dtype would round them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vitcop_vllm.pruning.grids import Grids

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Columns(NamedTuple):
    """Extra columns of a pruned image's embeddings, in this order.

    Attributes:
        width: H, columns of the embeddings themselves, deepstack features among them.
        labels: Whether there is a column with each token's cluster label.
        places: Whether there are two columns with each token's row and column in the image's grid.
    """

    width: int
    labels: bool
    places: bool

    def append(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None,
        index: torch.Tensor,
        grids: Grids,
    ) -> torch.Tensor:
        """Append the extra columns to the embeddings of images with equal grids.

        Args:
            embeddings: (..., n, H).
            labels: (..., n) int64 cluster labels; ``None`` without clusters.
            index: (..., n) int64 visual tokens.
            grids: Grids of each image's visual tokens; one grid if there are ``places``.

        Returns:
            (..., n, H + number of extra columns)
        """
        integers = []
        if self.labels:
            assert labels is not None
            integers.append(labels)
        if self.places:
            (grid,) = grids
            integers.append(index.div(grid.columns, rounding_mode="floor"))
            integers.append(index.remainder(grid.columns))
        if not integers:
            return embeddings
        dtype = embeddings.dtype
        columns = torch.stack(integers, dim=-1).to(_BITS[dtype]).view(dtype)
        return torch.cat((embeddings, columns), dim=-1)

    def num_tokens(self, embeddings: Sequence[torch.Tensor]) -> int:
        """Tokens of the images with extra columns."""
        return sum(len(image) for image in embeddings if image.shape[1] > self.width)

    def split(
        self, embeddings: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Split the embeddings of a step's images from their extra columns.

        Args:
            embeddings: Per image, (n, H) or (n, H + number of extra columns).

        Returns:
            Embeddings: (n, H) per image.
            Labels: (N,) int64 of all images' tokens, 0 for an image without extra columns;
            ``None`` if no image has any.
            Places: (N, 2) int64, likewise: row and column.
        """
        plain = [image[:, : self.width] for image in embeddings]
        num_columns = self.labels + 2 * self.places
        if not num_columns or not self.num_tokens(embeddings):
            return plain, None, None
        integers = torch.cat(
            [
                image[:, self.width :].contiguous().view(_BITS[image.dtype]).to(torch.int64)
                if image.shape[1] > self.width
                else image.new_zeros(len(image), num_columns, dtype=torch.int64)
                for image in embeddings
            ]
        )
        labels = integers[:, 0] if self.labels else None
        return plain, labels, integers[:, -2:] if self.places else None
