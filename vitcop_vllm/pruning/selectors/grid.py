"""Tokens spread evenly over the image, the same ones in each image of a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import EncoderView


def even_grid(view: EncoderView, count: int) -> Tensor:
    """The first ``count`` tokens in the order of ordered dithering (Bayer, 1973).

    With any count, two aligned squares of 2^k tokens a side differ by at most one kept token.
    """
    import torch

    height, width = view.grid
    token = torch.arange(height * width, device=view.pixels.device)
    row, column = token.div(width, rounding_mode="floor"), token.remainder(width)
    order = torch.zeros_like(token)
    # The lowest bit of a place, whether it is odd, weighs most in its threshold.
    for bit in range((max(height, width) - 1).bit_length()):
        down, right = (row >> bit) & 1, (column >> bit) & 1
        order = 4 * order + 2 * (down ^ right) + down
    index = order.argsort(stable=True)[:count].sort().values
    return index.expand(view.pixels.shape[0], -1)


SELECTOR = Selector(encoder_alone, encoder=even_grid)
