"""Running a decoder in stages, each with fewer visual rows. Shared by all models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig

from vitcop_vllm.engine.attention import StagedAttention
from vitcop_vllm.models.crossing import Crossing, LayerBefore
from vitcop_vllm.models.stages import FirstStage, LastStage, MiddleStage, layers_by_stage
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.step import StagedForward


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
        self._cross = Crossing(selector, kernels, decoder.norm)
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
        sink: SelectionSink | None = None,
    ) -> torch.Tensor:
        """The decoder's forward for a step in which rows are dropped between stages.

        Args:
            step: How the step's rows change between stages.
            positions: (T,) or (3, T) rotary positions.
            inputs_embeds: (T, H) embeddings, images merged in.
            labels: Cluster labels, one (n1,) tensor per clustered image of the step.
            sink: Records what is selected at the boundaries; ``None`` records nothing.

        Returns:
            (T, H) hidden states; a dropped token's row repeats its span's last survivor.
        """
        layer_before = self._run_to_boundary(1, positions, inputs_embeds)
        rows = self._cross(1, step, positions, layer_before, labels, sink)
        layer_before = self._run_to_boundary(2, *rows)
        positions = rows[0] if step.renumbered is None else step.renumbered
        rows = self._cross(2, step, positions, layer_before, labels, sink)
        normed: torch.Tensor = self._stages[-1](*rows)
        return normed[step.outputs]

    def _run_to_boundary(self, stage: int, *rows: torch.Tensor) -> LayerBefore:
        """Compute the layers before ``stage``, 1 or 2, on the rows that the last one left."""
        attention = self._last_attention[stage - 1]
        with _recorded_inputs(attention, copy=self._is_compiled) as recorded:
            hidden, residual = self._stages[stage - 1](*rows)
        query, key = recorded
        return LayerBefore(attention.impl.scale, query, key, hidden, residual)
