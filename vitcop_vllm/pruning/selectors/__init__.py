"""The selectors: one file each, which exports ``SELECTOR``. The file's name is the selector's.

To add a selector, add a file. Settings, command line, benchmarks and tests then know its name.
The server loads these files without torch: import torch inside the functions that need it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitcop_vllm.pruning.selector import Selector


@cache
def selector_of(name: str) -> Selector:
    """The selector in the file ``name``; see ``settings.SELECTOR_NAMES``."""
    selector: Selector = import_module(f"{__name__}.{name}").SELECTOR
    return selector
