"""The last layer of a CLIP tower computes only the rows that are kept.

Stage I selects by that layer's queries and keys, before the layer has done most of its work.
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
    """Rows of the layer that are read later: N of B images with T rows each.

    Attributes:
        of_image: (B, n) int64 in [0, T); images with fewer than n are padded with 0.
        unpadded: (N,) int64 in [0, B * n), which of them are no padding; ``None``: all.
        of_batch: (N,) int64 in [0, B * T), the same rows without padding.
    """

    of_image: torch.Tensor
    unpadded: torch.Tensor | None
    of_batch: torch.Tensor


def kept_rows(groups: Groups, kept: Kept, device: torch.device) -> KeptRows:
    """Rows of the kept tokens, of images with [CLS] in front."""
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
    # On the host, which knows all lengths: a device would have to be waited for.
    is_kept = torch.arange(of_image.shape[1]) < lengths[:, None]
    unpadded = async_tensor_h2d(is_kept.flatten().nonzero().squeeze(1), device=device)
    return KeptRows(of_image, unpadded, of_batch[unpadded])


_TAKES_FEWER_QUERIES = (AttentionBackendEnum.TORCH_SDPA,)
"""Encoder attention of vLLM's that need not have as many queries as keys."""


@contextmanager
def skip_dropped_rows(layer: Any, rows_after: Callable[[torch.Tensor], KeptRows]) -> Iterator[None]:
    """Report a layer's Q, K and V, then compute the rest of the layer for the kept rows only.

    Dropped rows contribute K and V. If the attention backend takes fewer queries than keys,
    their queries are skipped too.

    Args:
        layer: Residual around ``self_attn``, which is ``qkv_proj``, ``attn`` and ``out_proj``,
            then around ``layer_norm2`` and ``mlp``.
        rows_after: Takes (B, T, 3 * local heads * D), the output of ``qkv_proj``, and returns
            the kept rows. The layer's output is of no use in dropped rows.
    """
    attention = layer.self_attn
    fewer_queries = attention.attn.attn_backend in _TAKES_FEWER_QUERIES
    rows: KeptRows
    batch: torch.Size

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal rows, batch
        rows, batch = rows_after(output[0]), output[0].shape[:2]

    def before_attention(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if not fewer_queries:
            return None
        query, key, value = inputs
        return gather_rows(query, rows.of_image), key, value

    def before_out_proj(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        attended = inputs[0].flatten(0, 1)
        if not fewer_queries:
            return attended[rows.of_batch]
        return attended if rows.unpadded is None else attended[rows.unpadded]

    def after_out_proj(_: nn.Module, __: object, output: Any) -> Any:
        return put_back(output[0]), *output[1:]

    def before_norm(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[rows.of_batch]

    def after_mlp(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return put_back(output)

    def put_back(some: torch.Tensor) -> torch.Tensor:
        """(N, C) rows where they stand in (B, T, C), for the residual."""
        whole = some.new_zeros(*batch, some.shape[-1])
        whole.flatten(0, 1)[rows.of_batch] = some
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
