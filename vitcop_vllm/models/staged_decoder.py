"""Runs a decoder segment by segment, each on fewer visual rows. All models share this module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.models.crossing import Crossing, LayerBefore
from vitcop_vllm.models.segments import FirstSegment, LastSegment, MiddleSegment, layers_by_segment
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.signals import Signal
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
    """Record query, key and value of an attention layer, after rotary embedding.

    The implementation's ``forward`` is replaced, because it runs as Python even in a compiled
    segment: the compiler does not trace vLLM's attention operator.

    Args:
        attention: vLLM's attention layer.
        copy: Whether to copy them. Needed if compiled code calls the layer, because that
            code reuses its buffers.
    """
    recorded: list[torch.Tensor] = []
    compute = attention.impl.forward

    def forward(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        recorded_query = query
        if query.dtype != key.dtype:  # with an FP8 KV cache, queries may be FP8 with a scale
            recorded_query = query.to(key.dtype) * attention._q_scale
        inputs = recorded_query, key, value
        recorded.extend([x.clone() for x in inputs] if copy else inputs)
        return compute(layer, query, key, value, *args, **kwargs)

    attention.impl.forward = forward
    try:
        yield recorded
    finally:
        del attention.impl.forward


def _raw_keys(layer: Any, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Keys of a decoder layer as projected, before the key norm and rotary embedding.

    vLLM's layer returns none, and compiled code calls no hook that could record them. So this
    computes them again, for the rows of images only.

    Args:
        layer: A decoder layer of vLLM's.
        stream: (T, H) residual stream that the layer gets.
        rows: (...) int64.

    Returns:
        (..., local KV heads, D)
    """
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.input_layernorm(stream[rows.flatten()]))
    first, size = attention.q_size, attention.kv_size
    keys: torch.Tensor = qkv[:, first : first + size]
    return keys.view(*rows.shape, -1, attention.head_dim)


class StagedDecoder:
    """Runs a decoder's layers segment by segment, each segment on fewer visual rows.

    vLLM compiles each segment with the same options as the decoder. With ``enforce_eager`` it
    compiles neither.

    Args:
        decoder: vLLM's decoder model. Its layers already have their segment's attention.
        boundaries: First layers of segments 1 and 2.
        selector: Selects the visual rows at each boundary.
        kernels: Implementation of the functions that select and merge tokens.
        signal: What the selector ranks tokens by, if it ranks them by a signal.
        vllm_config: Configuration of the decoder.
        num_deepstack_levels: First layers after which the model adds deepstack features.
    """

    def __init__(
        self,
        decoder: Any,
        boundaries: tuple[int, int],
        selector: Selector,
        kernels: KernelSet,
        signal: Signal,
        vllm_config: VllmConfig,
        num_deepstack_levels: int = 0,
    ) -> None:
        layers: Sequence[Any] = decoder.layers
        self._cross = Crossing(selector, kernels, signal, decoder.norm)
        self._last_layers = [layers[boundary - 1] for boundary in boundaries]
        first, middle, last = layers_by_segment(layers, boundaries, selector, num_deepstack_levels)
        keeps_input = selector.ranks_by_signal and signal.reads_raw_keys
        parts: Any = (
            (FirstSegment, {"layers": first, "keeps_input": keeps_input}),
            (MiddleSegment, {"layers": middle, "keeps_input": keeps_input}),
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
        labels: torch.Tensor | None,
        sink: SelectionSink | None = None,
        deepstack: IntermediateTensors | None = None,
    ) -> torch.Tensor:
        """The decoder's forward for a step in which rows are dropped between segments.

        Args:
            step: How the step's rows change between segments.
            positions: (T,) or (3, T) rotary positions.
            inputs_embeds: (T, H) embeddings, images merged in.
            labels: (T,) cluster labels of the rows of segment 0; ``None`` without clusters.
            sink: Records what is selected at the boundaries; ``None`` records nothing.
            deepstack: (T, H) features that the model adds after its first layers; ``None`` for
                models without.

        Returns:
            (T, H) hidden states. The row of a dropped token repeats its span's last kept row.
        """
        layer_before = self._run_to_boundary(1, positions, inputs_embeds, deepstack)
        rows = self._cross(1, step, positions, layer_before, labels, sink)
        layer_before = self._run_to_boundary(2, *rows)
        positions = rows[0] if step.renumbered is None else step.renumbered
        rows = self._cross(2, step, positions, layer_before, labels, sink)
        normed: torch.Tensor = self._segments[-1](*rows)
        return normed[step.outputs]

    def _run_to_boundary(self, segment: int, *rows: Any) -> LayerBefore:
        """Compute the segment before ``segment``, which is 1 or 2, on the rows that entered it."""
        layer = self._last_layers[segment - 1]
        attention = layer.self_attn.attn
        with _recorded_inputs(attention, copy=self._is_compiled) as recorded:
            hidden, residual, stream = self._segments[segment - 1](*rows)
        query, key, value = recorded
        raw_keys = partial(_raw_keys, layer, stream)
        return LayerBefore(attention.impl.scale, query, key, value, raw_keys, hidden, residual)
