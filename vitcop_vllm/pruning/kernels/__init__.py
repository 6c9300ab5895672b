"""Choosing tokens on a GPU with one launch where torch takes dozens: Triton kernels.

Each function returns what the torch function of its name returns, with indices, groups and
labels bit for bit. Where ranks matter one program serves one image. It counts them: comparing
every token with every other is n^2 integer operations, and takes neither a sort nor a second
launch.

Threads hand values to each other through memory, with a barrier in between.
"""

from functools import partial, wraps
from typing import Any

from torch import Tensor

from vitcop_vllm.pruning.kernel_set import TORCH, KernelSet
from vitcop_vllm.pruning.kernels.clustering import cluster_labels
from vitcop_vllm.pruning.kernels.order import first
from vitcop_vllm.pruning.kernels.selection import merge_tokens, select_stage_two

MAX_TOKENS = 1024
"""Tokens of one image that one program compares with each other. Larger images use torch."""


def _unless_large(kernel: Any, torch_function: Any) -> Any:
    """``kernel`` for values (B, n, ...) of at most :data:`MAX_TOKENS` tokens n, else torch."""

    @wraps(torch_function)
    def choose(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        function = kernel if values.shape[1] <= MAX_TOKENS else torch_function
        return function(values, *args, **kwargs)

    return choose


_KERNELS = KernelSet(
    most_salient=partial(first, descending=True),
    cluster_labels=cluster_labels,
    select_stage_two=select_stage_two,
    merge_tokens=merge_tokens,
    select_stage_three=first,
)

TRITON = KernelSet(*map(_unless_large, _KERNELS, TORCH))
