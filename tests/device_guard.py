"""Runs CUDA code without a GPU, and raises where the host would wait for the GPU.

Tensors on ``cuda`` are fake: they have a shape and a device, but no values. Host tensors are
real.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class HostSyncError(Exception):
    """An operation makes the host wait for the GPU, or mixes host and GPU tensors."""


def _devices(*values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class _NoHostSync(TorchDispatchMode):
    """Refuses operations that mix tensors of host and GPU.

    Three kinds of operations may mix them:

    - a non-blocking copy to the GPU;
    - a factory such as ``zeros_like``, which reads no values;
    - ``fill_`` with a scalar host tensor, the operation behind ``x[:n] = 0``. The scalar is
      passed as a kernel argument.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        before = _devices(args, kwargs)
        if "cuda" not in before and (device is None or torch.device(device).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "aten":
            with self:  # inference mode does not decompose operations by itself
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        if before == {"cpu", "cuda"} and not self._may_mix(func, args):
            raise HostSyncError(f"{func} gets tensors of host and GPU")
        if func in _INDEXED and any(
            leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1])
            if isinstance(leaf, torch.Tensor)
        ):
            raise HostSyncError(f"{func} counts the elements of a mask")
        result = func(*args, **kwargs)
        after = _devices(result)
        if "cuda" in before and "cpu" in after:
            raise HostSyncError(f"{func} moves a tensor to the host")
        if before == {"cpu"} and func in _COPIES and not kwargs.get("non_blocking"):
            raise HostSyncError(f"{func} blocks until the tensor is on the GPU")
        return result

    @staticmethod
    def _may_mix(func: Any, args: Any) -> bool:
        if func is torch.ops.aten.copy_.default:
            target, _, *non_blocking = args
            return target.is_cuda and non_blocking == [True]
        return func is torch.ops.aten.fill_.Tensor


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Lets the code inside use ``cuda``, and raises if the host would wait for the GPU.

    Raises:
        HostSyncError: If an operation moves a tensor to the host, blocks until a copy to the GPU
            is done, or mixes tensors of host and GPU.
        DataDependentOutputException: If the host reads a value on the GPU.
        DynamicOutputShapeException: If a shape depends on values on the GPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _NoHostSync():
        yield
