"""The tokens that receive most attention from all tokens, summed over heads."""

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector

SELECTOR = Selector(encoder_alone, saliency=("received",))
