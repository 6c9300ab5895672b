"""Communication between tensor-parallel ranks when tokens are selected."""

import torch
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)


def mean_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of the ranks' tensors. All ranks get the same result.

    The reduced tensor is flat, because vLLM passes 2-D float32 tensors to FlashInfer if it is
    installed. FlashInfer fails or warns if the row length is not divisible by 4.

    Args:
        x: A tensor of the same shape on all ranks.
        ranks: Number of tensor-parallel ranks.
    """
    if ranks == 1:
        return x
    total: torch.Tensor = tensor_model_parallel_all_reduce(x.reshape(-1).contiguous())
    return total.view(x.shape) / ranks


def concat_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Concatenate the ranks' (..., C) tensors to (..., ranks * C), in order of ranks.

    The gather is along the last dimension. Along the first, vLLM may return a buffer that the next
    gather overwrites. The input is made contiguous, because some of vLLM's communicators need it.
    """
    if ranks == 1:
        return x
    gathered: torch.Tensor = tensor_model_parallel_all_gather(x.contiguous(), dim=-1)
    return gathered
