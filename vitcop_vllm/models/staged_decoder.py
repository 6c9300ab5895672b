"""Running a decoder in stages, each with fewer visual rows. Shared by all models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.pruning.selection import (
    mean_key_norm,
    merge_tokens,
    select_stage_three,
    select_stage_two,
)
from vitcop_vllm.worker.step import SpanGroup, StagedForward


def stage_layers(
    layers: Sequence[Any], boundaries: tuple[int, int], vllm_config: VllmConfig
) -> None:
    """Give the layers of the second and third stage their stage's attention."""
    for index, layer in enumerate(layers):
        stage = sum(index >= boundary for boundary in boundaries)
        if stage:
            layer.self_attn.attn = StagedAttention.replacing(
                layer.self_attn.attn, stage, vllm_config
            )


@contextmanager
def _recorded_keys(attention: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the keys (after rotary embedding) that an attention layer is called with.

    A hook for the length of a call: decode steps, which vLLM compiles, never see it.
    """
    keys: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[1]))
    try:
        yield keys
    finally:
        handle.remove()


def key_norms(keys: torch.Tensor, num_local_heads: int) -> torch.Tensor:
    """:func:`mean_key_norm` over the KV heads of all tensor-parallel ranks.

    Args:
        keys: (..., num_local_heads * D) keys of this rank's heads.
        num_local_heads: KV heads on this rank.

    Returns:
        (...) float32, the same on every rank; smaller is more salient.
    """
    heads = keys.unflatten(-1, (num_local_heads, -1))
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1:
        # The mean of the ranks' means: each holds equally many heads, and where there are
        # fewer heads than ranks each head is held equally often.
        mean = tensor_model_parallel_all_reduce(heads.float().mean(dim=-2)) / ranks
        heads = mean.unsqueeze(-2)
    return mean_key_norm(heads)


def _select_rows(
    group: SpanGroup,
    stage: int,
    keys: torch.Tensor,
    num_local_heads: int,
    labels: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which rows of the stage before stand for a group's spans in ``stage``.

    Args:
        group: G spans with equal counts; n rows each before, m after.
        stage: 1 or 2.
        keys: (T, num_local_heads * D) of the layer before.
        num_local_heads: KV heads on this rank.
        labels: Cluster labels per pruned picture of the step, (n1,) each.
        hidden, residual: (T, H); their sum is the residual stream.

    Returns:
        (G, m) rows, and what the residual stream there becomes: (G, m, H) where tokens
        are merged, ``None`` where rows are only dropped.
    """
    counts = group.counts
    before = group.rows(stage - 1)
    if counts.stages[stage] == counts.stages[stage - 1]:
        # Mild ratios spend everything before the deep stage: nothing to merge or drop.
        return before, None
    norms = key_norms(keys[before], num_local_heads)
    if stage == 2:
        return before.gather(1, select_stage_three(norms, counts.stages[2])), None
    selection = select_stage_two(
        norms,
        torch.stack([labels[picture] for picture in group.pictures]),
        counts.centres,
        counts.stages[1],
    )
    return before.gather(1, selection.index), merge_tokens(
        hidden[before] + residual[before], selection
    )


def staged_forward(
    decoder: Any,
    boundaries: tuple[int, int],
    step: StagedForward,
    positions: torch.Tensor,
    inputs_embeds: torch.Tensor,
    labels: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The decoder's forward for a step in which rows are dropped between stages.

    Args:
        decoder: vLLM's decoder model; its layers are called as its own forward does.
        boundaries: First layers of the second and third stage.
        step: How the step's rows change between stages.
        positions: (T,) rotary positions.
        inputs_embeds: (T, H) embeddings, pictures merged in.
        labels: Cluster labels, one (n1,) tensor per pruned picture of the step.

    Returns:
        (T, H) hidden states; a dropped token's row repeats its span's last survivor.
    """
    hidden: torch.Tensor = inputs_embeds
    residual: torch.Tensor | None = None
    first = 0
    for stage, boundary in enumerate(boundaries, start=1):
        for layer in decoder.layers[first : boundary - 1]:
            hidden, residual = layer(positions, hidden, residual)
        last = decoder.layers[boundary - 1]
        attention = last.self_attn.attn
        with _recorded_keys(attention) as keys:
            hidden, residual = last(positions, hidden, residual)
        assert residual is not None
        source = step.sources[stage].clone()
        merged = []
        for group in step.groups:
            rows, stream = _select_rows(
                group, stage, keys[0], attention.num_kv_heads, labels, hidden, residual
            )
            destination = group.rows(stage)
            source[destination] = rows
            if stream is not None:
                merged.append((destination, stream))
        if stage == len(boundaries) and step.renumbered is not None:
            positions = step.renumbered
        positions, hidden, residual = positions[source], hidden[source], residual[source]
        for destination, stream in merged:
            hidden[destination] = 0
            residual[destination] = stream
        first = boundary
    for layer in decoder.layers[first:]:
        hidden, residual = layer(positions, hidden, residual)
    hidden, _ = decoder.norm(hidden, residual)
    return hidden[step.outputs]
