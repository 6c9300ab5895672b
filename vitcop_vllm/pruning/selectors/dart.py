"""DART (arXiv 2502.11494): pivot tokens, and the tokens least similar to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import shallow_boundary_alone
from vitcop_vllm.pruning.selector import Selector, indices_of

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import BoundaryView


NUM_PIVOTS = 8
"""As published for LLaVA-1.5."""


def least_duplicated(view: BoundaryView, count: int) -> Tensor:
    """The :data:`NUM_PIVOTS` tokens with the largest keys are pivots, by L1 norm over all heads.

    Each pivot in turn keeps, of the tokens that are left, those with the smallest cosine
    similarity to it, in the hidden state after the decoder's last norm. If the count does not
    divide by the pivots, the first pivots keep one token more each.

    DART is published with four pivots from the question and four from the image. Here all are
    from the image, so that the selection does not depend on the question.
    """
    import torch
    import torch.nn.functional as F

    sizes = view.mean_over_ranks(view.keys[view.rows].float().abs().sum(dim=(2, 3)))
    num_pivots = min(NUM_PIVOTS, count)
    pivots = sizes.argsort(dim=1, descending=True, stable=True)[:, :num_pivots]
    taken = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, pivots, True)
    # A cosine does not depend on the length by which the norm divides.
    unit = F.normalize(view.hidden().float() * view.norm_weight.float(), dim=-1)
    similarity = unit.gather(1, pivots[:, :, None].expand(-1, -1, unit.shape[2])) @ unit.mT
    share, rest = divmod(count - num_pivots, num_pivots)
    for pivot in range(num_pivots):
        left = similarity[:, pivot].masked_fill(taken, torch.inf)
        quota = share + (pivot < rest)
        taken = taken.scatter(1, left.argsort(dim=1, stable=True)[:, :quota], True)
    return indices_of(taken, count)


SELECTOR = Selector(shallow_boundary_alone, shallow=least_duplicated, reads_hidden=(1,))
