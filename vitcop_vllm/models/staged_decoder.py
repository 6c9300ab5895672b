"""Runs a decoder segment by segment, each on fewer visual rows. All models share this module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.models.crossing import Crossing, LayerBefore
from vitcop_vllm.models.segments import FirstSegment, LastSegment, MiddleSegment, layers_by_segment
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.step import StagedForward


def replace_attention(
    layers: Sequence[Any], boundaries: tuple[int, int], vllm_config: VllmConfig
) -> None:
    """Replace the attention of all layers by the attention of their segment."""
    for index, layer in enumerate(layers):
        segment = sum(index >= boundary for boundary in boundaries)
        layer.self_attn.attn = StagedAttention.replacing(layer.self_attn.attn, segment, vllm_config)


@contextmanager
def _recorded_inputs(attention: Any, *, copy: bool) -> Iterator[list[torch.Tensor]]:
    """Record the query and key of an attention layer, after rotary embedding.

    The implementation's ``forward`` is replaced, because it runs as Python even in a compiled
    segment: the compiler does not trace vLLM's attention operator.

    Args:
        attention: vLLM's attention layer.
        copy: Whether to copy query and key. Needed if compiled code calls the layer, because that
            code reuses its buffers.
    """
    recorded: list[torch.Tensor] = []
    compute = attention.impl.forward

    def forward(
        layer: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        recorded_query = query
        if query.dtype != key.dtype:  # with an FP8 KV cache, queries may be FP8 with a scale
            recorded_query = query.to(key.dtype) * attention._q_scale
        recorded.extend((recorded_query.clone(), key.clone()) if copy else (recorded_query, key))
        return compute(layer, query, key, *args, **kwargs)

    attention.impl.forward = forward
    try:
        yield recorded
    finally:
        del attention.impl.forward


class StagedDecoder:
    """Runs a decoder's layers segment by segment, each segment on fewer visual rows.

    vLLM compiles each segment with the same options as the decoder. With ``enforce_eager`` it
    compiles neither.

    Args:
        decoder: vLLM's decoder model. Its layers already have their segment's attention.
        boundaries: First layers of segments 1 and 2.
        selector: Selects the visual rows at each boundary.
        kernels: Implementation of the functions that select and merge tokens.
        vllm_config: Configuration of the decoder.
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
        self._cross = Crossing(selector, kernels, decoder.norm)
        self._last_attention = [layers[boundary - 1].self_attn.attn for boundary in boundaries]
        first, middle, last = layers_by_segment(layers, boundaries, selector)
        parts: Any = (
            (FirstSegment, {"layers": first}),
            (MiddleSegment, {"layers": middle}),
            (LastSegment, {"layers": last, "norm": decoder.norm}),
        )
        self._segments = []
        for number, (segment, arguments) in enumerate(parts):
            # vLLM caches compiled code by this tag. The decoder's code has another tag.
            with set_model_tag(f"vitcop_segment_{number}"):
                self._segments.append(segment(vllm_config=vllm_config, **arguments))
        self._is_compiled = not all(segment.do_not_compile for segment in self._segments)

    def __call__(
        self,
        step: StagedForward,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor,
        labels: Sequence[torch.Tensor],
        sink: SelectionSink | None = None,
    ) -> torch.Tensor:
        """The decoder's forward for a step in which rows are dropped between segments.

        Args:
            step: How the step's rows change between segments.
            positions: (T,) or (3, T) rotary positions.
            inputs_embeds: (T, H) embeddings, images merged in.
            labels: Cluster labels, one (n1,) tensor per clustered image of the step.
            sink: Records what is selected at the boundaries; ``None`` records nothing.

        Returns:
            (T, H) hidden states. The row of a dropped token repeats its span's last kept row.
        """
        layer_before = self._run_to_boundary(1, positions, inputs_embeds)
        rows = self._cross(1, step, positions, layer_before, labels, sink)
        layer_before = self._run_to_boundary(2, *rows)
        positions = rows[0] if step.renumbered is None else step.renumbered
        rows = self._cross(2, step, positions, layer_before, labels, sink)
        normed: torch.Tensor = self._segments[-1](*rows)
        return normed[step.outputs]

    def _run_to_boundary(self, segment: int, *rows: torch.Tensor) -> LayerBefore:
        """Compute the segment before ``segment``, which is 1 or 2, on the rows that entered it."""
        attention = self._last_attention[segment - 1]
        with _recorded_inputs(attention, copy=self._is_compiled) as recorded:
            hidden, residual = self._segments[segment - 1](*rows)
        query, key = recorded
        return LayerBefore(attention.impl.scale, query, key, hidden, residual)
