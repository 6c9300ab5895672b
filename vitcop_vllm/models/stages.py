"""The stages of a decoder, in a form that vLLM compiles.

A *stage* is a run of decoder layers that compute the same rows: stage 0, 1 or 2.
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


def layers_by_stage(
    layers: Sequence[Any], boundaries: tuple[int, int], selector: Selector
) -> tuple[list[Any], list[Any], list[Any]]:
    """The layers of each stage.

    If the selector drops rows before the MLP of a stage's last layer, the layer is split: its MLP
    belongs to the next stage.
    """
    shallow, deep = boundaries
    stages = [*layers[:shallow]], [*layers[shallow:deep]], [*layers[deep:]]
    for stage in (1, 2):
        if selector.drops_before_mlp(stage):
            last = stages[stage - 1].pop()
            stages[stage - 1].append(_UpToMLP(last))
            stages[stage].insert(0, _FromMLP(last))
    return stages


class _Stage(nn.Module):
    """Layers, or parts of layers, that run on the same rows."""

    def __init__(self, *, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = [*layers]  # a list, because they are submodules of the decoder


# Each stage has its own `forward`. If they shared it, torch.compile would run the code of the first
# compiled stage for all of them: vLLM drops the guards that tell stages apart.


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0})
class FirstStage(_Stage):
    """Stage 0: layers up to the shallow boundary."""

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
    """Stage 1: layers between the boundaries."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


@support_torch_compile(dynamic_arg_dims={"positions": -1, "hidden": 0, "residual": 0})
class LastStage(_Stage):
    """Stage 2: layers from the deep boundary on, and the decoder's last norm."""

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
