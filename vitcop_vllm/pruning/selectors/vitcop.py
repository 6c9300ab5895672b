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
    """Stage II: clusters are merged; tokens with the smallest keys stay whole."""
    assert view.labels is not None
    return view.kernels.select_stage_two(view.key_norms(), view.labels, view.num_centres, count)


def smallest_keys(view: BoundaryView, count: int) -> Tensor:
    """Stage III: the tokens with the smallest keys, by the norm of their mean over heads."""
    return view.kernels.select_stage_three(view.key_norms(), count)


SELECTOR = Selector(
    three_stages,
    saliency=("cls", "received"),
    shallow=merge_clusters,
    deep=smallest_keys,
    clusters=True,
    reads_hidden=(1,),
)
