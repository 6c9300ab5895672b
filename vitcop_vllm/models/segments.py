"""The segments of a decoder, in a form that vLLM compiles.

A *segment* is a run of decoder layers that compute the same rows; see ``pruning.plan``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile

from vitcop_vllm.pruning.selector import Selector


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
    layers: Sequence[Any], boundaries: tuple[int, int], selector: Selector
) -> tuple[list[Any], list[Any], list[Any]]:
    """The layers of each segment.

    If the selector drops rows before the MLP of a segment's last layer, the layer is split: its MLP
    belongs to the next segment.
    """
    shallow, deep = boundaries
    segments = [*layers[:shallow]], [*layers[shallow:deep]], [*layers[deep:]]
    for segment in (1, 2):
        if selector.drops_before_mlp(segment):
            last = segments[segment - 1].pop()
            segments[segment - 1].append(_UpToMLP(last))
            segments[segment].insert(0, _FromMLP(last))
    return segments


class _Segment(nn.Module):
    """Layers, or parts of layers, that run on the same rows."""

    def __init__(self, *, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = [*layers]  # a list, because they are submodules of the decoder


# Each segment has its own `forward`. If they shared it, torch.compile would run the code of the
# first compiled segment for all of them: vLLM drops the guards that tell segments apart.


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0})
class FirstSegment(_Segment):
    """Segment 0: layers up to the shallow boundary."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class MiddleSegment(_Segment):
    """Segment 1: layers between the boundaries."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class LastSegment(_Segment):
    """Segment 2: layers from the deep boundary on, and the decoder's last norm."""

    def __init__(self, *, layers: Sequence[Any], norm: nn.Module) -> None:
        super().__init__(layers=layers)
        self.norms = [norm]

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norms[0](hidden, residual)
        return hidden
