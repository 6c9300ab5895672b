"""Dropped rows skip most of the last layer of a CLIP, SigLIP or InternViT tower.

Stage I selects by that layer's queries and keys, which exist before the layer computes the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True)
class LayerParts:
    """Modules of a layer with two residuals, around its attention and around its MLP.

    Attributes:
        attention: vLLM's ``MMEncoderAttention``, called with (B, T, local heads * D) queries, keys
            and values.
        projection: Takes the attention's output.
        norm, mlp: The second residual's.
    """

    attention: Any
    projection: nn.Module
    norm: nn.Module
    mlp: nn.Module

    @classmethod
    def of_clip(cls, layer: Any) -> Self:
        """Those of a layer of CLIP or SigLIP."""
        attention = layer.self_attn
        return cls(attention.attn, attention.out_proj, layer.layer_norm2, layer.mlp)


@contextmanager
def skip_dropped_rows(
    parts: LayerParts, select_rows: Callable[[torch.Tensor, torch.Tensor], KeptRows]
) -> Iterator[None]:
    """Report a layer's queries and keys, then compute the rest of the layer for kept rows only.

    Dropped rows contribute K and V. If the attention backend allows fewer queries than keys,
    their queries are skipped too.

    Args:
        parts: Modules of the layer.
        select_rows: Takes the queries and the keys that the attention gets, each
            (B, T, local heads * D), and returns the kept rows. The layer's output in dropped rows
            is meaningless.
    """
    rows: KeptRows
    batch: torch.Size

    def query_rows() -> torch.Tensor | None:
        """``of_image`` if the attention computes these queries only."""
        return rows.of_image if parts.attention.attn_backend in _ALLOW_FEWER_QUERIES else None

    def before_attention(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        nonlocal rows, batch
        query, key, value = inputs
        rows, batch = select_rows(query, key), query.shape[:2]
        if (of_image := query_rows()) is None:
            return None
        return gather_rows(query, of_image), key, value

    def before_projection(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        attended = inputs[0].flatten(0, 1)
        if query_rows() is None:
            return attended[rows.of_batch]
        return attended if rows.unpadded is None else attended[rows.unpadded]

    def after_projection(_: nn.Module, __: object, output: Any) -> Any:
        # vLLM's parallel layers return a bias too.
        return (scatter(output[0]), *output[1:]) if type(output) is tuple else scatter(output)

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
        parts.attention.register_forward_pre_hook(before_attention),
        parts.projection.register_forward_pre_hook(before_projection),
        parts.projection.register_forward_hook(after_projection),
        parts.norm.register_forward_pre_hook(before_norm),
        parts.mlp.register_forward_hook(after_mlp),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
