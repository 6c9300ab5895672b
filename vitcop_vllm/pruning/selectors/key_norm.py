"""ViTCoP's Stage III at both boundaries: as published, the tokens with the smallest keys."""

from vitcop_vllm.pruning.budgets import both_boundaries
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.selectors.vitcop import smallest_scores

SELECTOR = Selector(
    both_boundaries, shallow=smallest_scores, deep=smallest_scores, ranks_by_signal=True
)
