"""Sums over tensor-parallel ranks, without ranks."""

import torch

from vitcop_vllm.models import tensor_parallel
from vitcop_vllm.models.tensor_parallel import mean_over_ranks


def test_the_mean_over_ranks_is_their_sum_divided(monkeypatch):
    held = torch.rand(3, 4).T
    assert mean_over_ranks(held, 1) is held

    def all_reduce(x):
        assert x.is_contiguous()
        return x + 2 * x

    monkeypatch.setattr(tensor_parallel, "tensor_model_parallel_all_reduce", all_reduce)
    torch.testing.assert_close(mean_over_ranks(held, 2), 1.5 * held)
