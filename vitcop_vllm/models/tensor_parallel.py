"""Values that tensor-parallel ranks combine when tokens are chosen."""

import torch
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)


def mean_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of the tensors that tensor-parallel ranks hold, the same on every rank.

    The ranks reduce a flat tensor: vLLM hands 2-D float32 tensors to FlashInfer if it is there,
    which fails or warns if their rows are not of a length divisible by 4.

    Args:
        x: Of equal shape on all ranks.
        ranks: How many there are.
    """
    if ranks == 1:
        return x
    total: torch.Tensor = tensor_model_parallel_all_reduce(x.reshape(-1).contiguous())
    return total.view(x.shape) / ranks


def concat_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """(..., C) of each rank to (..., ranks * C), in order of ranks.

    Along the last dimension: gathered along the first, vLLM may return a buffer that the next
    gather overwrites. Contiguous, because some of vLLM's communicators take no other.
    """
    if ranks == 1:
        return x
    gathered: torch.Tensor = tensor_model_parallel_all_gather(x.contiguous(), dim=-1)
    return gathered
