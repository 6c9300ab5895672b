"""Stage I inside a vision tower: what stays is chosen before the tower has done all its work."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

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
    return rows if len(numbers) == rows.shape[0] else rows[numbers]


def rows_that_stay(
    members: Mapping[VisualTokenCounts, Sequence[int]], chosen: Chosen, device: torch.device
) -> torch.Tensor:
    """(N,) int64 rows of the encoder's patches that stay, of pictures with [CLS] in front."""
    rows = []
    for counts, numbers in members.items():
        number = async_tensor_h2d(torch.tensor(numbers), device=device)
        first = number[:, None] * (1 + counts.encoder) + 1
        if counts in chosen:
            index = chosen[counts].index
        else:
            index = torch.arange(counts.encoder, device=device)
        rows.append((first + index).flatten())
    return torch.cat(rows)


@contextmanager
def watching(
    layer: Any, rows_after: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Tells what a tower's layer attends by, and has its MLP compute the rows that are named.

    The MLP is most of a layer's work, and in the last layer nobody reads the rows that go.

    Args:
        layer: Residual around ``self_attn``, which has ``qkv_proj``, then around ``mlp``.
        rows_after: Takes (B, T, 3 * local heads * D), what ``qkv_proj`` puts out, and names
            rows, (N,) int64 in [0, B * T), or with ``None`` all of them.
    """
    rows: torch.Tensor | None = None
    shape = torch.Size()

    def after_qkv(_: nn.Module, __: object, output: Any) -> None:
        nonlocal rows
        rows = rows_after(output[0])

    def before_mlp(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        nonlocal shape
        shape = inputs[0].shape
        return None if rows is None else inputs[0].flatten(0, 1)[rows]

    def after_mlp(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        if rows is None:
            return output
        whole = output.new_zeros(shape)
        whole.flatten(0, 1)[rows] = output
        return whole

    hooks = (
        layer.self_attn.qkv_proj.register_forward_hook(after_qkv),
        layer.mlp.register_forward_pre_hook(before_mlp),
        layer.mlp.register_forward_hook(after_mlp),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
