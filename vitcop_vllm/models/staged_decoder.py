"""Running a decoder in stages, each with fewer visual rows. Shared by all models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.models.stages import FirstStage, LastStage, MiddleStage, layers_by_stage
from vitcop_vllm.pruning.budgets import Selector
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.selection import StageTwoSelection
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
def _recorded_inputs(attention: Any, *, copy: bool) -> Iterator[list[torch.Tensor]]:
    """Collects query and key (after rotary embedding) that an attention layer works on.

    Taken where compiled code, too, comes back to Python: what calls the implementation is an
    operator that vLLM's compiler does not look into. Such code uses its buffers again: then they
    must be copied.
    """
    recorded: list[torch.Tensor] = []
    compute = attention.impl.forward

    def forward(
        layer: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        recorded_query = query
        if query.dtype != key.dtype:  # an FP8 KV cache may want queries in FP8, with a scale
            recorded_query = query.to(key.dtype) * attention._q_scale
        recorded.extend((recorded_query.clone(), key.clone()) if copy else (recorded_query, key))
        return compute(layer, query, key, *args, **kwargs)

    attention.impl.forward = forward
    try:
        yield recorded
    finally:
        del attention.impl.forward


def mean_over_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of what ``ranks`` tensor-parallel ranks hold, the same on every rank."""
    if ranks == 1:
        return x
    mean: torch.Tensor = tensor_model_parallel_all_reduce(x.contiguous()) / ranks
    return mean


class _LayerBefore(NamedTuple):
    """What the last layer before a boundary attended by, and what crosses; T rows.

    Attributes:
        scale: Factor on the scores of its attention.
        query, key: (T, local heads, D), (T, local KV heads, D), after rotary embedding.
        hidden, residual: (T, H); their sum is the residual stream, which lacks the layer's MLP
            where the selector drops before it.
    """

    scale: float
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
    kernels: KernelSet,
) -> tuple[torch.Tensor, torch.Tensor | StageTwoSelection | None, torch.Tensor | None]:
    """Which rows of the stage before stand for a group's spans in ``stage``.

    Args:
        selector: What chooses them.
        group: G spans with equal counts; n rows each before, m after.
        stage: 1 or 2.
        layer: The last layer of the stage before.
        labels: Cluster labels per clustered picture of the step, (n1,) each.
        norm_weight: (H,), of the norm that ends the decoder.
        kernels: Implementation of the functions that choose and merge tokens.

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
        queries=layer.query,
        keys=layer.key,
        scale=layer.scale,
        hidden=lambda: layer.hidden[before] + layer.residual[before],
        norm_weight=norm_weight,
        prompt_rows=group.prompt_rows[stage - 1],
        labels=torch.stack([labels[i] for i in group.pictures]) if counts.centres else None,
        num_centres=counts.centres,
        mean_over_ranks=partial(mean_over_ranks, ranks=get_tensor_model_parallel_world_size()),
        kernels=kernels,
    )
    chosen = select_tokens(selector, stage, view, counts.stages[stage])
    if isinstance(chosen, StageTwoSelection):
        return before.gather(1, chosen.index), chosen, kernels.merge_tokens(view.hidden(), chosen)
    return before.gather(1, chosen), chosen, None


class StagedDecoder:
    """Runs a decoder's layers stage by stage, each with fewer visual rows.

    Each stage is compiled as vLLM compiles the decoder, with the same options; with
    ``enforce_eager`` nothing is.

    Args:
        decoder: vLLM's decoder model, its layers with their stages' attention.
        boundaries: First layers of the second and third stage.
        selector: What chooses the visual rows that go on.
        kernels: Implementation of the functions that choose and merge tokens.
        vllm_config: As the decoder was made with.
    """

    def __init__(
        self,
        decoder: Any,
        boundaries: tuple[int, int],
        selector: Selector,
        kernels: KernelSet,
        vllm_config: VllmConfig,
    ) -> None:
        layers: Sequence[Any] = decoder.layers
        self._selector = selector
        self._kernels = kernels
        self._norm = decoder.norm
        self._last_attention = [layers[boundary - 1].self_attn.attn for boundary in boundaries]
        first, middle, last = layers_by_stage(layers, boundaries, selector)
        parts: Any = (
            (FirstStage, {"layers": first}),
            (MiddleStage, {"layers": middle}),
            (LastStage, {"layers": last, "norm": decoder.norm}),
        )
        self._stages = []
        for number, (stage, arguments) in enumerate(parts):
            # What vLLM keeps compiled code under, beside the decoder's own.
            with set_model_tag(f"vitcop_stage_{number}"):
                self._stages.append(stage(vllm_config=vllm_config, **arguments))
        self._is_compiled = not all(stage.do_not_compile for stage in self._stages)

    def __call__(
        self,
        step: StagedForward,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor,
        labels: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The decoder's forward for a step in which rows are dropped between stages.

        Args:
            step: How the step's rows change between stages.
            positions: (T,) rotary positions.
            inputs_embeds: (T, H) embeddings, pictures merged in.
            labels: Cluster labels, one (n1,) tensor per clustered picture of the step.

        Returns:
            (T, H) hidden states; a dropped token's row repeats its span's last survivor.
        """
        layer_before = self._run_to_boundary(1, positions, inputs_embeds)
        rows = self._cross(1, step, positions, layer_before, labels)
        layer_before = self._run_to_boundary(2, *rows)
        positions = rows[0] if step.renumbered is None else step.renumbered
        rows = self._cross(2, step, positions, layer_before, labels)
        normed: torch.Tensor = self._stages[-1](*rows)
        return normed[step.outputs]

    def _run_to_boundary(self, stage: int, *rows: torch.Tensor) -> _LayerBefore:
        """Compute the layers before ``stage``, 1 or 2, on the rows that the last one left."""
        attention = self._last_attention[stage - 1]
        with _recorded_inputs(attention, copy=self._is_compiled) as recorded:
            hidden, residual = self._stages[stage - 1](*rows)
        query, key = recorded
        return _LayerBefore(attention.impl.scale, query, key, hidden, residual)

    def _cross(
        self,
        stage: int,
        step: StagedForward,
        positions: torch.Tensor,
        layer_before: _LayerBefore,
        labels: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that enter ``stage``: positions, hidden states and residual."""
        source = step.sources[stage].clone()
        merged = []
        with SELECTION_SECONDS.labels(stage + 1).time():
            for group in step.groups:
                rows, chosen, stream = _select_rows(
                    self._selector,
                    group,
                    stage,
                    layer_before,
                    labels,
                    self._norm.weight,
                    self._kernels,
                )
                if step.record is not None and chosen is not None:
                    step.record(group, stage, chosen)
                destination = group.rows(stage)
                source[destination] = rows
                if stream is not None:
                    merged.append((destination, stream))
        hidden, residual = layer_before.hidden[source], layer_before.residual[source]
        for destination, stream in merged:
            hidden[destination] = 0
            residual[destination] = stream
        return positions[source], hidden, residual
