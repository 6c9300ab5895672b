"""What tensor-parallel ranks tell each other when tokens are chosen."""

import torch
from vllm.distributed import tensor_model_parallel_all_reduce


def mean_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of what ``ranks`` tensor-parallel ranks hold, the same on every rank."""
    if ranks == 1:
        return x
    mean: torch.Tensor = tensor_model_parallel_all_reduce(x.contiguous()) / ranks
    return mean
