"""ViTCoP (arXiv 2601.17818).

Stage I keeps the tokens that [CLS] attends to most; in encoders without [CLS], for which nothing is
published, those that receive most attention from all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import three_stages
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.selection import StageTwoSelection
    from vitcop_vllm.pruning.views import BoundaryView


def merge_clusters(view: BoundaryView, count: int) -> StageTwoSelection:
    """Stage II: clusters are merged; the tokens with the smallest scores stay whole."""
    assert view.labels is not None
    return view.kernels.select_stage_two(view.scores(), view.labels, view.num_centres, count)


def smallest_scores(view: BoundaryView, count: int) -> Tensor:
    """Stage III: the tokens with the smallest scores; as published, those of smallest keys."""
    return view.kernels.select_stage_three(view.scores(), count)


SELECTOR = Selector(
    three_stages,
    saliency=("cls", "received"),
    shallow=merge_clusters,
    deep=smallest_scores,
    clusters=True,
    ranks_by_signal=True,
    reads_hidden=(1,),
)
