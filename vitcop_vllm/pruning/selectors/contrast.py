"""Tokens that stand out from their image, and an even grid of the others.

Ours, not published. Where the demo model lost counts and text, tokens beside things were kept and
background was not; see docs/notebook.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import deep_boundary_alone
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import BoundaryView, EncoderView


def standing_out(view: EncoderView, count: int) -> Tensor:
    """Stage I: tokens that stand out, then the others in the order of the selector ``grid``.

    A token stands out by the cosine distance of its embedding to the mean direction of the image's
    tokens, and by the attention that it gets from [CLS], or from all tokens without [CLS]. Both
    count equally: each is divided by its standard deviation. The image is split into tokens that
    stand out and others where the variance between both is largest (Otsu, 1979). If more than
    ``count`` stand out, those that do most are kept.
    """
    import torch
    import torch.nn.functional as F

    from vitcop_vllm.pruning.selectors.grid import even_ranks

    unit = F.normalize(view.embed().float(), dim=-1)
    contrast = 1.0 - torch.einsum("bvh,bh->bv", unit, unit.mean(dim=1))
    saliency = view.saliency("cls" if view.offers_cls else "received")
    falling, order = (_standard(contrast) + _standard(saliency)).sort(
        dim=1, descending=True, stable=True
    )
    rank = order.argsort(dim=1)
    even = even_ranks(view.grids, unit.device).argsort(stable=True).argsort()
    place = torch.where(rank < best_split(falling)[:, None], rank, view.num_tokens + even)
    return place.argsort(dim=1)[:, :count].sort(dim=1).values


def _standard(values: Tensor) -> Tensor:
    """(B, V) float64 values over their standard deviation."""
    wide = values.double()
    return wide / wide.std(dim=1, correction=0, keepdim=True).clamp_min(1e-12)


def best_split(falling: Tensor) -> Tensor:
    """(B,) int64, how many of (B, V) descending values come before the best split; at least 1."""
    import torch

    wide = falling.double()
    num_tokens = wide.shape[1]
    before = torch.arange(1, num_tokens + 1, device=wide.device, dtype=torch.float64)
    after = num_tokens - before
    sums = wide.cumsum(dim=1)
    rest = sums[:, -1:] - sums
    gap = sums / before - rest / after.clamp_min(1.0)
    return (before * after * gap.square()).argmax(dim=1) + 1


def most_attended(view: BoundaryView, count: int) -> Tensor:
    """Stage III: tokens that receive most attention from the last tokens of their image."""
    return view.kernels.select_stage_three(view.image_attention(), count)


SELECTOR = Selector(
    deep_boundary_alone,
    encoder=standing_out,
    deep=most_attended,
    reads_embeddings=True,
    reads_layer=True,
)
