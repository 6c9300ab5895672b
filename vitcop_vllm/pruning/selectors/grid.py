"""Tokens spread evenly over the image, the same ones in each image of a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vitcop_vllm.pruning.grids import Grid, Grids
    from vitcop_vllm.pruning.views import EncoderView


def even_grid(view: EncoderView, count: int) -> Tensor:
    """The first ``count`` tokens in the order of ordered dithering (Bayer, 1973).

    With any count, two aligned squares of 2^k tokens a side differ by at most one kept token. Of
    several grids, each keeps the same share. Row marks come last in their grid's order.
    """
    ranks = even_ranks(view.grids, view.pixels.device)
    index = ranks.argsort(stable=True)[:count].sort().values
    return index.expand(view.pixels.shape[0], -1)


def even_ranks(grids: Grids, device: torch.device) -> Tensor:
    """(V,) float64 place of each token in the order of its grid, in [0, 1)."""
    import torch

    return torch.cat([_ranks(grid, device) for grid in grids])


def _ranks(grid: Grid, device: torch.device) -> Tensor:
    """(V,) float64 place of each token in its grid's order, as a share of the grid's tokens."""
    import torch

    width = grid.columns + grid.row_marks
    token = torch.arange(grid.num_tokens, device=device)
    row, column = token.div(width, rounding_mode="floor"), token.remainder(width)
    order = (column == grid.columns).long()
    # The lowest bit of a place, whether it is odd, weighs most in its threshold.
    for bit in range((max(grid.rows, width) - 1).bit_length()):
        down, right = (row >> bit) & 1, (column >> bit) & 1
        order = 4 * order + 2 * (down ^ right) + down
    rank = order.argsort(stable=True).argsort()
    return rank.double() / torch.full_like(rank, grid.num_tokens, dtype=torch.float64)


SELECTOR = Selector(encoder_alone, encoder=even_grid)
