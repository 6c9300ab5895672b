"""Triton kernels that select tokens on a GPU, with few launches where torch needs dozens.

Each function returns the same as the torch function of its name; indices, groups and labels are
bit-identical. If a kernel needs ranks, one program computes one image and compares every token with
every other. That takes n^2 integer operations, but no sort and no second launch.

Threads exchange values through memory, with a barrier between write and read.
"""

from functools import partial, wraps
from typing import Any

from torch import Tensor

from vitcop_vllm.pruning.kernel_set import TORCH, KernelSet
from vitcop_vllm.pruning.kernels.clustering import cluster_labels
from vitcop_vllm.pruning.kernels.order import first
from vitcop_vllm.pruning.kernels.selection import merge_tokens, select_stage_two

MAX_TOKENS = 1024
"""Maximum tokens of an image that the kernels accept. Larger images use torch."""


def _unless_large(kernel: Any, torch_function: Any) -> Any:
    """``kernel`` for values (B, n, ...) if n <= :data:`MAX_TOKENS`, else ``torch_function``."""

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
