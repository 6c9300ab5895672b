"""Stage I inside a vision tower: what stays is chosen before the tower has done all its work."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.selectors import EncoderView


@dataclass(frozen=True)
class ChosenPatches:
    """What is kept of pictures with equal counts; B pictures.

    Attributes:
        view: What it was chosen by.
        index: (B, n1) int64, the patches that stay, ascending.
        labels: (B, n1) int64 cluster labels of these; ``None`` without centres.
    """

    view: EncoderView
    index: torch.Tensor
    labels: torch.Tensor | None


Chosen = Mapping[VisualTokenCounts, ChosenPatches]


def members_of(pictures: Sequence[VisualTokenCounts]) -> dict[VisualTokenCounts, list[int]]:
    """Numbers of the pictures of each counts, ascending."""
    members: dict[VisualTokenCounts, list[int]] = {}
    for number, counts in enumerate(pictures):
        members.setdefault(counts, []).append(number)
    return members


def batch_of(rows: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """``rows`` of some pictures, (B, ...); of all of them without a copy."""
    if len(numbers) == rows.shape[0]:
        return rows
    return rows[async_tensor_h2d(torch.tensor(numbers), device=rows.device)]


@dataclass(frozen=True)
class RowsThatStay:
    """Rows of a tower's last layer that somebody reads: N of B pictures with T rows each.

    Attributes:
        of_picture: (B, n) int64 in [0, T); where a picture has fewer than n, padded with 0.
        unpadded: (N,) int64 in [0, B * n), which of them are no padding; ``None``: all.
        of_batch: (N,) int64 in [0, B * T), the same rows without padding.
    """

    of_picture: torch.Tensor
    unpadded: torch.Tensor | None
    of_batch: torch.Tensor


def rows_that_stay(
    members: Mapping[VisualTokenCounts, Sequence[int]], chosen: Chosen, device: torch.device
) -> RowsThatStay:
    """Rows of the patches that stay, of pictures with [CLS] in front."""
    (tokens,) = {1 + counts.encoder for counts in members}
    lengths = torch.zeros(sum(map(len, members.values())), dtype=torch.int64)
    for counts, numbers in members.items():
        lengths[numbers] = counts.stages[0]
    of_picture = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64, device=device)
    for counts, numbers in members.items():
        if counts in chosen:
            index = chosen[counts].index
        else:
            index = torch.arange(counts.encoder, device=device).expand(len(numbers), -1)
        picture = async_tensor_h2d(torch.tensor(numbers), device=device)
        of_picture[picture, : counts.stages[0]] = 1 + index
    first = torch.arange(0, len(lengths) * tokens, tokens, device=device)
    of_batch = (first[:, None] + of_picture).flatten()
    if len(members) == 1:
        return RowsThatStay(of_picture, None, of_batch)
    # On the host, which knows all lengths: a device would have to be waited for.
    stays = torch.arange(of_picture.shape[1]) < lengths[:, None]
    unpadded = async_tensor_h2d(stays.flatten().nonzero().squeeze(1), device=device)
    return RowsThatStay(of_picture, unpadded, of_batch[unpadded])


_TAKES_FEWER_QUERIES = (AttentionBackendEnum.TORCH_SDPA,)
"""Encoder attention of vLLM's that need not have as many queries as keys."""


@contextmanager
def watching(
    layer: Any, rows_after: Callable[[torch.Tensor], RowsThatStay | None]
) -> Iterator[None]:
    """Tells what a tower's layer attends by, and has it compute no rows but those named.

    In the last layer nobody reads the rows that go: they need a key and a value, for the others
    to attend to, and no more. Where vLLM's attention can, they are no queries either.

    Args:
        layer: Residual around ``self_attn``, which is ``qkv_proj``, ``attn`` and ``out_proj``,
            then around ``layer_norm2`` and ``mlp``.
        rows_after: Takes (B, T, 3 * local heads * D), what ``qkv_proj`` puts out, and names
            rows, or with ``None`` all of them. Of the others the layer puts out nothing of
            use.
    """
    attention = layer.self_attn
    fewer_queries = attention.attn.attn_backend in _TAKES_FEWER_QUERIES
    rows: RowsThatStay | None = None
    batch = torch.Size()

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal rows, batch
        rows, batch = rows_after(output[0]), output[0].shape[:2]

    def before_attention(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if rows is None or not fewer_queries:
            return None
        query, key, value = inputs
        return take(query, rows.of_picture), key, value

    def before_out_proj(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        if rows is None:
            return None
        attended = inputs[0].flatten(0, 1)
        if not fewer_queries:
            return attended[rows.of_batch]
        return attended if rows.unpadded is None else attended[rows.unpadded]

    def after_out_proj(_: nn.Module, __: object, output: Any) -> Any:
        return None if rows is None else (put_back(output[0], rows), *output[1:])

    def before_norm(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        return None if rows is None else inputs[0].flatten(0, 1)[rows.of_batch]

    def after_mlp(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor | None:
        return None if rows is None else put_back(output, rows)

    def put_back(some: torch.Tensor, rows: RowsThatStay) -> torch.Tensor:
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


def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, V, C) rows at (B, n) indices: (B, n, C)."""
    # Not gather: on a CPU, looking up whole rows is many times faster than each number.
    return rows[torch.arange(index.shape[0], device=index.device)[:, None], index]
