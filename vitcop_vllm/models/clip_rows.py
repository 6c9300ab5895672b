"""Dropped rows skip most of the last layer of a CLIP tower.

Stage I selects by that layer's queries and keys, which exist before the layer computes the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vitcop_vllm.models.stage_one import Groups, Kept, gather_rows


@dataclass(frozen=True)
class KeptRows:
    """The N kept rows of B images with T rows each.

    Attributes:
        of_image: (B, n) int64 in [0, T), kept rows of each image, padded with 0 to n; ``None`` if
            only the device knows how many rows each has.
        unpadded: (N,) int64 in [0, B * n), entries of ``of_image`` that are not padding; ``None``
            if there is no padding.
        of_batch: (N,) int64 in [0, B * T), the kept rows in the whole batch, without padding.
    """

    of_image: torch.Tensor | None
    unpadded: torch.Tensor | None
    of_batch: torch.Tensor


def kept_rows(groups: Groups, kept: Kept, device: torch.device) -> KeptRows:
    """Rows of the kept tokens, in images whose first row is [CLS]."""
    (num_rows,) = {1 + shape.counts.encoder for shape in groups}
    lengths = torch.zeros(sum(map(len, groups.values())), dtype=torch.int64)
    for shape, numbers in groups.items():
        lengths[numbers] = shape.counts.stages[0]
    of_image = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64, device=device)
    for shape, numbers in groups.items():
        if shape in kept:
            index = kept[shape].index
        else:
            index = torch.arange(shape.counts.encoder, device=device).expand(len(numbers), -1)
        image = async_tensor_h2d(torch.tensor(numbers), device=device)
        of_image[image, : shape.counts.stages[0]] = 1 + index
    first = torch.arange(0, len(lengths) * num_rows, num_rows, device=device)
    of_batch = (first[:, None] + of_image).flatten()
    if len(groups) == 1:
        return KeptRows(of_image, None, of_batch)
    # nonzero runs on the host, which knows all lengths: on a device, the host would wait for it.
    is_kept = torch.arange(of_image.shape[1]) < lengths[:, None]
    unpadded = async_tensor_h2d(is_kept.flatten().nonzero().squeeze(1), device=device)
    return KeptRows(of_image, unpadded, of_batch[unpadded])


_ALLOW_FEWER_QUERIES = (AttentionBackendEnum.TORCH_SDPA,)
"""Backends of vLLM's encoder attention that allow fewer queries than keys."""


@contextmanager
def skip_dropped_rows(
    layer: Any, select_rows: Callable[[torch.Tensor], KeptRows]
) -> Iterator[None]:
    """Report a layer's Q, K and V, then compute the rest of the layer for the kept rows only.

    Dropped rows contribute K and V. If the attention backend allows fewer queries than keys,
    their queries are skipped too.

    Args:
        layer: A residual around ``self_attn`` (``qkv_proj``, ``attn``, ``out_proj``), then a
            residual around ``layer_norm2`` and ``mlp``.
        select_rows: Takes (B, T, 3 * local heads * D), the output of ``qkv_proj``, and returns
            the kept rows. The layer's output in dropped rows is meaningless.
    """
    attention = layer.self_attn
    rows: KeptRows
    batch: torch.Size

    def query_rows() -> torch.Tensor | None:
        """``of_image`` if the attention computes these queries only."""
        return rows.of_image if attention.attn.attn_backend in _ALLOW_FEWER_QUERIES else None

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal rows, batch
        rows, batch = select_rows(output[0]), output[0].shape[:2]

    def before_attention(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if (of_image := query_rows()) is None:
            return None
        query, key, value = inputs
        return gather_rows(query, of_image), key, value

    def before_out_proj(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        attended = inputs[0].flatten(0, 1)
        if query_rows() is None:
            return attended[rows.of_batch]
        return attended if rows.unpadded is None else attended[rows.unpadded]

    def after_out_proj(_: nn.Module, __: object, output: Any) -> Any:
        return scatter(output[0]), *output[1:]

    def before_norm(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[rows.of_batch]

    def after_mlp(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return scatter(output)

    def scatter(kept: torch.Tensor) -> torch.Tensor:
        """(N, C) kept rows at their places in (B, T, C), the shape of the residual."""
        whole = kept.new_zeros(*batch, kept.shape[-1])
        whole.flatten(0, 1)[rows.of_batch] = kept
        return whole

    hooks = (
        attention.qkv_proj.register_forward_hook(after_qkv),
        attention.attn.register_forward_pre_hook(before_attention),
        attention.out_proj.register_forward_pre_hook(before_out_proj),
        attention.out_proj.register_forward_hook(after_out_proj),
        layer.layer_norm2.register_forward_pre_hook(before_norm),
        layer.mlp.register_forward_hook(after_mlp),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
