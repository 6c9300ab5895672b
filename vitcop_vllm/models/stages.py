"""What a decoder computes between two boundaries, in a form that vLLM compiles."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile

from vitcop_vllm.pruning.selector import Selector


class _UpToMLP:
    """A decoder layer of vLLM's as far as its attention; what is dropped then spares its MLP."""

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
    """The rest of such a layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self._layer.post_attention_layernorm(hidden, residual)
        return self._layer.mlp(hidden), residual


def layers_by_stage(
    layers: Sequence[Any], boundaries: tuple[int, int], selector: Selector
) -> tuple[list[Any], list[Any], list[Any]]:
    """What each stage computes: layers, and halves of those that the selector drops within."""
    shallow, deep = boundaries
    stages = [*layers[:shallow]], [*layers[shallow:deep]], [*layers[deep:]]
    for stage in (1, 2):
        if selector.drops_before_mlp(stage):
            last = stages[stage - 1].pop()
            stages[stage - 1].append(_UpToMLP(last))
            stages[stage].insert(0, _FromMLP(last))
    return stages


class _Stage(nn.Module):
    """Layers, or halves of layers, that run on the same rows."""

    def __init__(self, *, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = [*layers]  # no submodules: they are the decoder's


# Of one code object torch.compile keeps one compiled form, and vLLM drops the guards that would
# notice another stage: each stage has a forward of its own.


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0})
class FirstStage(_Stage):
    """Layers up to the shallow boundary."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class MiddleStage(_Stage):
    """Layers between the boundaries."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class LastStage(_Stage):
    """Layers from the deep boundary on, and the norm that ends the decoder."""

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
