"""Running a decoder in stages, each with fewer visual rows. Shared by all models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.pruning.budgets import Selector
from vitcop_vllm.pruning.selection import StageTwoSelection, merge_tokens
from vitcop_vllm.pruning.selectors import BoundaryView, select_tokens
from vitcop_vllm.worker.step import SpanGroup, StagedForward


def stage_layers(
    layers: Sequence[Any], boundaries: tuple[int, int], vllm_config: VllmConfig
) -> None:
    """Give the layers their stage's attention."""
    for index, layer in enumerate(layers):
        stage = sum(index >= boundary for boundary in boundaries)
        layer.self_attn.attn = StagedAttention.replacing(layer.self_attn.attn, stage, vllm_config)


@contextmanager
def _recorded_inputs(attention: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects query and key (after rotary embedding) that an attention layer is called with.

    A hook for the length of a call: decode steps, which vLLM compiles, never see it.
    """
    recorded: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: recorded.extend(inputs[:2]))
    try:
        yield recorded
    finally:
        handle.remove()


def mean_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of what ``ranks`` tensor-parallel ranks hold, the same on every rank."""
    if ranks == 1:
        return x
    mean: torch.Tensor = tensor_model_parallel_all_reduce(x.contiguous()) / ranks
    return mean


class _LayerBefore(NamedTuple):
    """What the last layer of a stage was called with, and what it left; T rows.

    Attributes:
        attention: Its attention layer.
        query, key: (T, local heads * D), (T, local KV heads * D), after rotary embedding.
        hidden, residual: (T, H); their sum is the residual stream.
    """

    attention: Any
    query: torch.Tensor
    key: torch.Tensor
    hidden: torch.Tensor
    residual: torch.Tensor


def _select_rows(
    selector: Selector,
    group: SpanGroup,
    stage: int,
    layer: _LayerBefore,
    labels: Sequence[torch.Tensor],
    norm_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | StageTwoSelection | None, torch.Tensor | None]:
    """Which rows of the stage before stand for a group's spans in ``stage``.

    Args:
        selector: What chooses them.
        group: G spans with equal counts; n rows each before, m after.
        stage: 1 or 2.
        layer: The last layer of the stage before.
        labels: Cluster labels per clustered picture of the step, (n1,) each.
        norm_weight: (H,), of the norm that ends the decoder.

    Returns:
        (G, m) rows; what was chosen, ``None`` where nothing had to be; and what the residual
        stream there becomes: (G, m, H) where tokens are merged, ``None`` where rows are only
        dropped.
    """
    counts = group.counts
    before = group.rows(stage - 1)
    if counts.stages[stage] == counts.stages[stage - 1]:
        # Many selectors drop nothing here, and mild ratios spend everything before Stage III.
        return before, None, None
    view = BoundaryView(
        rows=before,
        queries=layer.query.unflatten(-1, (layer.attention.num_heads, -1)),
        keys=layer.key.unflatten(-1, (layer.attention.num_kv_heads, -1)),
        scale=layer.attention.impl.scale,
        hidden=lambda: layer.hidden[before] + layer.residual[before],
        norm_weight=norm_weight,
        prompt_rows=group.prompt_rows[stage - 1],
        labels=torch.stack([labels[i] for i in group.pictures]) if counts.centres else None,
        num_centres=counts.centres,
        mean_over_ranks=partial(mean_over_ranks, ranks=get_tensor_model_parallel_world_size()),
    )
    chosen = select_tokens(selector, stage, view, counts.stages[stage])
    if isinstance(chosen, StageTwoSelection):
        return before.gather(1, chosen.index), chosen, merge_tokens(view.hidden(), chosen)
    return before.gather(1, chosen), chosen, None


def staged_forward(
    decoder: Any,
    selector: Selector,
    boundaries: tuple[int, int],
    step: StagedForward,
    positions: torch.Tensor,
    inputs_embeds: torch.Tensor,
    labels: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The decoder's forward for a step in which rows are dropped between stages.

    Args:
        decoder: vLLM's decoder model; its layers are called as its own forward does.
        selector: What chooses the visual rows that go on.
        boundaries: First layers of the second and third stage.
        step: How the step's rows change between stages.
        positions: (T,) rotary positions.
        inputs_embeds: (T, H) embeddings, pictures merged in.
        labels: Cluster labels, one (n1,) tensor per clustered picture of the step.

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
        with _recorded_inputs(attention) as recorded:
            hidden, residual = last(positions, hidden, residual)
        assert residual is not None
        query, key = recorded
        layer_before = _LayerBefore(attention, query, key, hidden, residual)
        source = step.sources[stage].clone()
        merged = []
        for group in step.groups:
            with SELECTION_SECONDS.labels(stage + 1).time():
                rows, chosen, stream = _select_rows(
                    selector, group, stage, layer_before, labels, decoder.norm.weight
                )
            if step.record is not None and chosen is not None:
                step.record(group, stage, chosen)
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
