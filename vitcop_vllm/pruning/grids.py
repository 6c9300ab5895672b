"""Grids of an image's visual tokens, and the place of each token in the image."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """Visual tokens that cover the image, row by row.

    Attributes:
        rows, columns: Tokens that stand for parts of the image. Both may be 0.
        row_marks: Whether each row ends with a mark: a token that is equal for all images.
    """

    rows: int
    columns: int
    row_marks: bool = False

    @property
    def num_tokens(self) -> int:
        return self.rows * (self.columns + self.row_marks)


Grids = tuple[Grid, ...]
"""Grids of an image, in the order of its tokens. Each grid covers the whole image."""


def largest_grid(grids: Grids) -> Grid:
    """The grid with the most tokens for parts of the image: the finest view of it."""
    return max(grids, key=lambda grid: grid.rows * grid.columns)


def count_tokens(grids: Iterable[Grid]) -> int:
    """V, number of visual tokens."""
    return sum(grid.num_tokens for grid in grids)


class TokenPlaces(NamedTuple):
    """Places of an image's V tokens.

    Attributes:
        positions: (V, 2) float32, row / rows and column / columns in the token's grid; in [0, 1),
            and 1 for the column of a row mark.
        z_order: (V,) int64, the place on a Z-order curve through the image. Tokens of several
            grids that cover the same part of the image lie together.
        is_mark: (V,) bool, whether the token is a row mark.
    """

    positions: np.ndarray
    z_order: np.ndarray
    is_mark: np.ndarray


@lru_cache(maxsize=256)
def token_places(grids: Grids) -> TokenPlaces:
    """Places of the tokens of these grids."""
    sized = [grid for grid in grids if grid.rows and grid.columns]
    most_rows, most_columns = (max(sizes) for sizes in list(zip(*sized, strict=True))[:2])
    positions, z_order, is_mark = [], [], []
    for grid in grids:
        row, column = np.indices((grid.rows, grid.columns + grid.row_marks)).reshape(2, -1)
        mark = column == grid.columns
        rows, columns = max(grid.rows, 1), max(grid.columns, 1)
        across = np.where(mark, np.float32(1), column.astype(np.float32) / np.float32(columns))
        positions.append(np.stack((row.astype(np.float32) / np.float32(rows), across), axis=1))
        z_order.append(_interleave(row * most_rows // rows, column * most_columns // columns))
        is_mark.append(mark)
    return TokenPlaces(*map(np.concatenate, (positions, z_order, is_mark)))


def _interleave(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(N,) int64 whose bits are those of row and column in turn."""
    code = np.zeros(row.shape, dtype=np.int64)
    for bit in range(int(max(row.max(initial=0), column.max(initial=0))).bit_length()):
        code |= (((row >> bit) & 1) << (2 * bit + 1)) | (((column >> bit) & 1) << (2 * bit))
    return code
