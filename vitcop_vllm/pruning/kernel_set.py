"""The functions that choose tokens, as torch operators or as Triton kernels.

A model takes its :class:`KernelSet` once, from the setting ``kernels``, and hands it to
whatever chooses tokens.
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
    """One implementation of each function; :data:`TORCH` holds the reference for all of them."""

    most_salient: Callable[[Tensor, int], Tensor]
    cluster_labels: Callable[..., Tensor]
    select_stage_two: Callable[[Tensor, Tensor, int, int], StageTwoSelection]
    merge_tokens: Callable[[Tensor, StageTwoSelection], Tensor]
    select_stage_three: Callable[[Tensor, int], Tensor]


TORCH = KernelSet(most_salient, cluster_labels, select_stage_two, merge_tokens, select_stage_three)


def kernel_set(name: KernelsName) -> KernelSet:
    """The implementation that the setting ``kernels`` names.

    Raises:
        ImportError: If it is ``triton`` and Triton is not installed.
    """
    if name != "triton":
        return TORCH
    # Imported here: builds of torch for CPUs come without Triton.
    from vitcop_vllm.pruning.kernels import TRITON

    return TRITON
