"""The segments of a decoder, in a form that vLLM compiles.

A *segment* is a run of decoder layers that compute the same rows; see ``pruning.plan``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.sequence import IntermediateTensors

from vitcop_vllm.pruning.selector import Selector

SegmentOutput = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(T, H) hidden states and residual after a segment, and the residual stream before its last layer
if the segment keeps it."""


class _UpToMLP:
    """A decoder layer of vLLM's without its MLP. Rows dropped after it skip the MLP."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, hidden = hidden, self._layer.input_layernorm(hidden)
        else:
            hidden, residual = self._layer.input_layernorm(hidden, residual)
        return self._layer.self_attn(positions=positions, hidden_states=hidden), residual


class _FromMLP:
    """The MLP of a decoder layer of vLLM's, with the norm before it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self._layer.post_attention_layernorm(hidden, residual)
        return self._layer.mlp(hidden), residual


def layers_by_segment(
    layers: Sequence[Any],
    boundaries: tuple[int, int],
    selector: Selector,
    num_deepstack_levels: int = 0,
) -> tuple[list[Any], list[Any], list[Any]]:
    """The layers of each segment.

    If the selector drops rows before the MLP of a segment's last layer, the layer is split: its MLP
    belongs to the next segment. A layer after which deepstack features are added stays whole.

    Args:
        layers: The decoder's layers.
        boundaries: First layers of segments 1 and 2.
        selector: Drops rows at the boundaries.
        num_deepstack_levels: First layers after which the model adds deepstack features.
    """
    shallow, deep = boundaries
    segments = [*layers[:shallow]], [*layers[shallow:deep]], [*layers[deep:]]
    for segment in (1, 2):
        is_deepstack = boundaries[segment - 1] <= num_deepstack_levels
        if selector.drops_before_mlp(segment) and not is_deepstack:
            last = segments[segment - 1].pop()
            segments[segment - 1].append(_UpToMLP(last))
            segments[segment].insert(0, _FromMLP(last))
    return segments


class _Segment(nn.Module):
    """Layers, or parts of layers, that run on the same rows.

    Args:
        layers: The layers.
        keeps_input: Whether the segment also returns the residual stream that its last layer gets.
    """

    def __init__(self, *, layers: Sequence[Any], keeps_input: bool = False) -> None:
        super().__init__()
        self.layers = [*layers]  # a list, because they are submodules of the decoder
        self.keeps_input = keeps_input

    def run(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        deepstack: IntermediateTensors | None = None,
    ) -> SegmentOutput:
        """All layers, one after the other."""
        stream = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if self.keeps_input and index == last:
                # Here, because the layer's norm adds in place.
                stream = hidden if residual is None else hidden + residual
            hidden, residual = layer(positions, hidden, residual)
            if deepstack is not None and index < len(deepstack):
                hidden = hidden + deepstack[f"deepstack_input_embeds_{index}"]
        assert residual is not None
        return hidden, residual, stream


# Each segment has its own `forward`. If they shared it, torch.compile would run the code of the
# first compiled segment for all of them: vLLM drops the guards that tell segments apart.


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "deepstack": 0})
class FirstSegment(_Segment):
    """Segment 0: layers up to the shallow boundary.

    The model adds ``deepstack`` features after the first layers, one level after each.
    """

    def forward(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        deepstack: IntermediateTensors | None = None,
    ) -> SegmentOutput:
        return self.run(positions, hidden, None, deepstack)


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class MiddleSegment(_Segment):
    """Segment 1: layers between the boundaries."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> SegmentOutput:
        return self.run(positions, hidden, residual)


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class LastSegment(_Segment):
    """Segment 2: layers from the deep boundary on, and the decoder's last norm."""

    def __init__(self, *, layers: Sequence[Any], norm: nn.Module) -> None:
        super().__init__(layers=layers)
        self.norms = [norm]

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        hidden, residual, _ = self.run(positions, hidden, residual)
        hidden, _ = self.norms[0](hidden, residual)
        return hidden
