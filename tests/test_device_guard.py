"""The guard raises on every operation that waits for the GPU, and on no other."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.utils import CpuGpuBuffer

from tests.device_guard import CUDA, HostSyncError, no_host_sync

HOST_INDEX = [0, 2]


def on_gpu():
    return async_tensor_h2d(HOST_INDEX, device=CUDA)


def assign(x, index, value):
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x.tolist(), DataDependentOutputException),
        (lambda x: bool((x > 0).any()), DataDependentOutputException),
        (lambda x: x[on_gpu()[0]], DataDependentOutputException),
        (lambda x: x.nonzero(), DynamicOutputShapeException),
        (lambda x: x.unique(), DynamicOutputShapeException),
        (lambda x: torch.repeat_interleave(x, x.long()), DynamicOutputShapeException),
        (lambda x: x[x > 0], HostSyncError),
        (lambda x: assign(x, x > 0, x), HostSyncError),
        (lambda x: assign(x, x > 0, 0), HostSyncError),
        (lambda x: x.cpu(), HostSyncError),
        (lambda x: torch.ones(5).copy_(x), HostSyncError),
        (lambda x: torch.ones(5).copy_(x, non_blocking=True), HostSyncError),
        (lambda x: x + torch.arange(5), HostSyncError),
        (lambda x: torch.tensor(HOST_INDEX, device=CUDA), HostSyncError),
        (lambda x: torch.tensor(HOST_INDEX).to(CUDA), HostSyncError),
        (lambda x: assign(x, slice(0, 2), torch.ones(2)), HostSyncError),
        (lambda x: assign(x, 1, 0), HostSyncError),  # copies, unlike an assignment to a slice
        (lambda x: x[HOST_INDEX], HostSyncError),
        (lambda x: x[torch.tensor(HOST_INDEX)], HostSyncError),
        (lambda x: assign(x, torch.tensor(HOST_INDEX), x[:2]), HostSyncError),
        (lambda x: assign(x, on_gpu(), 0), HostSyncError),
        (lambda x: assign(x, on_gpu(), torch.tensor(0.0)), HostSyncError),
        (lambda x: x.index_fill(0, on_gpu(), torch.tensor(0.0)), HostSyncError),
        (lambda x: x.index_fill(0, torch.tensor(HOST_INDEX), 0), HostSyncError),
        (lambda x: x.index_select(0, torch.tensor(HOST_INDEX)), HostSyncError),
        (lambda x: x.index_copy(0, torch.tensor(HOST_INDEX), x[:2]), HostSyncError),
        (lambda x: x.index_add(0, torch.tensor(HOST_INDEX), x[:2]), HostSyncError),
        (lambda x: x.take(torch.tensor(HOST_INDEX)), HostSyncError),
        (lambda x: x.gather(0, torch.tensor(HOST_INDEX)), HostSyncError),
        (lambda x: x.scatter(0, torch.tensor(HOST_INDEX), 1.0), HostSyncError),
        (lambda x: x.scatter(0, on_gpu(), torch.ones(2)), HostSyncError),
        (lambda x: x.scatter_add(0, torch.tensor(HOST_INDEX), x), HostSyncError),
        (lambda x: torch.searchsorted(torch.ones(2), x), HostSyncError),
        (lambda x: torch.where(torch.ones(5) > 0, x, x), HostSyncError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_an_operation_that_waits_for_the_gpu_raises(act, error, inference):
    with torch.inference_mode(inference), no_host_sync(), pytest.raises(error):
        act(torch.ones(5, device=CUDA))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x[on_gpu()],
        lambda x: assign(x, on_gpu(), x[:2]),
        lambda x: assign(x, slice(0, 2), 0),
        lambda x: x.index_fill_(0, on_gpu(), 0),
        lambda x: x.masked_fill(x > 0, 0),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.zeros_like(torch.ones(3), device=CUDA),
        lambda x: torch.ones(3).new_zeros(3, device=CUDA),
        lambda x: torch.repeat_interleave(x, x.long(), output_size=5),
        lambda x: CpuGpuBuffer(3, dtype=torch.int32, device=CUDA).copy_to_gpu(2),
        lambda x: x.new_full((1,), int(torch.tensor(HOST_INDEX).max())),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_an_operation_that_does_not_wait_passes(act, inference):
    with torch.inference_mode(inference), no_host_sync():
        assert act(torch.ones(5, device=CUDA)).device == CUDA


def test_host_tensors_have_values():
    with no_host_sync():
        lengths = torch.zeros(4, dtype=torch.int64)
        lengths[HOST_INDEX] = 3
        assert lengths.tolist() == [3, 0, 3, 0]
        assert lengths.nonzero().flatten().tolist() == HOST_INDEX
