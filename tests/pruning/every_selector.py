"""All selectors, by name."""

from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import SELECTOR_NAMES

SELECTORS: dict[str, Selector] = {name: selector_of(name) for name in SELECTOR_NAMES}
