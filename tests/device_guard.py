"""Runs code for a GPU without one, and fails where it would make the host wait for the GPU.

Tensors on ``cuda`` are fake: they know shapes and devices but have no values. Tensors on the
host are real.
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
    """An operation would make the host wait for the GPU, or mixes host and GPU tensors."""


def _devices(*values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class _NoHostSync(TorchDispatchMode):
    """Lets an operation see tensors of one device only.

    Three operations may see both. A copy to the GPU that does not block. A factory such as
    ``zeros_like``, which reads no values. And ``fill_`` with a scalar tensor of the host, which
    is what ``x[:n] = 0`` calls, and which passes the scalar as an argument of the kernel.
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
            with self:  # inference mode does not take operations apart by itself
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
    """Code inside may use ``cuda`` and may not wait for it.

    Raises:
        HostSyncError: If an operation moves a tensor to the host, blocks until one is on the
            GPU, or mixes tensors of both.
        DataDependentOutputException: If the host asks for a value on the GPU.
        DynamicOutputShapeException: If a shape depends on values on the GPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _NoHostSync():
        yield
