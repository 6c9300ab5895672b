"""A decoder's layers, split into segments."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.segments import layers_by_segment


class Layer(nn.Module):
    """A layer like vLLM's Llama layer, whose norms add the residual to the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def input_layernorm(self, hidden, residual=None):
        if residual is None:
            return 2 * hidden
        return 2 * (hidden + residual), hidden + residual

    def post_attention_layernorm(self, hidden, residual):
        return 3 * (hidden + residual), hidden + residual

    def self_attn(self, *, positions, hidden_states):
        return self.attention(hidden_states) + positions[:, None]

    def forward(self, positions, hidden, residual):
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@torch.inference_mode()
@pytest.mark.parametrize("boundaries", [(1, 2), (2, 3)])
@pytest.mark.parametrize("selector", ["vitcop", "key_norm", "fastv", "dart", "cls"])
def test_segments_compute_the_same_as_the_layers(selector, boundaries):
    torch.manual_seed(0)
    layers = [Layer() for _ in range(4)]
    positions, hidden = torch.arange(5.0), torch.randn(5, 8)
    staged: Any
    unstaged: Any
    segments = layers_by_segment(layers, boundaries, SELECTORS[selector])
    staged, unstaged = (hidden, None), (hidden, None)
    for layer in layers:
        unstaged = layer(positions, *unstaged)
    for layer in chain(*segments):
        staged = layer(positions, *staged)
    assert torch.equal(staged[0], unstaged[0])
    assert torch.equal(staged[1], unstaged[1])


@pytest.mark.parametrize(
    ("selector", "cuts"),
    [("vitcop", [2]), ("key_norm", [1, 2]), ("fastv", [1]), ("dart", []), ("cls", [])],
)
def test_a_boundary_splits_a_layer_before_the_mlp_if_the_selector_allows_it(selector, cuts):
    layers = [Layer() for _ in range(6)]
    segments = layers_by_segment(layers, (2, 4), SELECTORS[selector])
    assert [len(segment) for segment in segments] == [2, 2 + (1 in cuts), 2 + (2 in cuts)]
    for segment, layer in enumerate((layers[1], layers[3]), start=1):
        assert (segments[segment - 1][-1] is layer) is (segment not in cuts)
