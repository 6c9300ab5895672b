"""The functions that select tokens, as torch operators or as Triton kernels.

A model gets its :class:`KernelSet` once, by the setting ``kernels``, and passes it to the code that
selects tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.saliency import most_salient
from vitcop_vllm.pruning.selection import (
    StageTwoSelection,
    merge_tokens,
    select_stage_three,
    select_stage_two,
)
from vitcop_vllm.pruning.settings import KernelsName


class KernelSet(NamedTuple):
    """One implementation of each function. :data:`TORCH` is the reference."""

    most_salient: Callable[[Tensor, int], Tensor]
    cluster_labels: Callable[..., Tensor]
    select_stage_two: Callable[[Tensor, Tensor, int, int], StageTwoSelection]
    merge_tokens: Callable[[Tensor, StageTwoSelection], Tensor]
    select_stage_three: Callable[[Tensor, int], Tensor]


TORCH = KernelSet(most_salient, cluster_labels, select_stage_two, merge_tokens, select_stage_three)


def kernel_set(name: KernelsName) -> KernelSet:
    """The implementation that the setting ``kernels`` names.

    Raises:
        ImportError: If ``name`` is ``triton`` and Triton is not installed.
    """
    if name != "triton":
        return TORCH
    # Imported only here, because torch builds for CPUs come without Triton.
    from vitcop_vllm.pruning.kernels import TRITON

    return TRITON
