"""Attention in plain operations; on a CPU its backward pass beats fused attention's."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "written_out"
"""Name for transformers. Layers with ``is_deep`` use the mask's second plane; a layer with
``is_watched`` keeps its weights."""

WINDOWS = "written_out_like_flash"
"""For Qwen's vision tower. transformers passes whole sequences and their limits, as it does to
flash attention, if the name contains "flash"; else it calls once per window."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """(N, heads, T, width) queries, keys and values -> (N, T, heads, width)."""
    scores = (query * options["scaling"]) @ key.transpose(-1, -2)
    if mask is not None:
        stage = int(getattr(module, "is_deep", False))
        scores = scores + mask[:, stage : stage + 1]
    weights = scores.softmax(-1)
    if getattr(module, "is_watched", False):
        module.weights = weights
    return (weights @ value).transpose(1, 2), None


def attend_in_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """(1, heads, T, width) in windows between ``cu_seq_lens_q`` -> (1, T, heads, width).

    One call of :func:`attend` computes all windows of a length.
    """
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(options["cu_seq_lens_q"].tolist()):
        starts.setdefault(end - start, []).append(start)
    states = torch.cat((query, key, value))  # (3, heads, T, width)
    out = torch.empty_like(query[0].transpose(0, 1))
    for length, firsts in starts.items():
        rows = (torch.tensor(firsts)[:, None] + torch.arange(length)).to(query.device)
        windows = states[:, :, rows.flatten()].unflatten(2, rows.shape).transpose(1, 2)
        q, k, v = windows.unbind()
        seen, _ = attend(module, q, k, v, None, scaling=options["scaling"])
        out = out.index_copy(0, rows.flatten(), seen.flatten(0, 1))
    return out[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionInterface.register(WINDOWS, attend_in_windows)
