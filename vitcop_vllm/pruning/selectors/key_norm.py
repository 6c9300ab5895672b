"""ViTCoP's Stage III at both boundaries: the tokens with the smallest keys."""

from vitcop_vllm.pruning.budgets import both_boundaries
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.selectors.vitcop import smallest_keys

SELECTOR = Selector(both_boundaries, shallow=smallest_keys, deep=smallest_keys)
