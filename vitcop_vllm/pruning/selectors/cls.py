"""The tokens that [CLS] attends to most: VisionZip's dominant tokens (arXiv 2412.04467)."""

from vitcop_vllm.pruning.budgets import encoder_alone
from vitcop_vllm.pruning.selector import Selector

SELECTOR = Selector(encoder_alone, saliency=("cls",))
