"""A decoder's layers, split into segments."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from vllm.sequence import IntermediateTensors

from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.segments import _Segment, layers_by_segment


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


def test_a_layer_before_deepstack_features_is_not_split():
    layers = [Layer() for _ in range(6)]
    for levels, lengths in ((1, [2, 3, 3]), (2, [2, 2, 3])):
        segments = layers_by_segment(layers, (2, 4), SELECTORS["key_norm"], levels)
        assert [len(segment) for segment in segments] == lengths


@torch.inference_mode()
def test_deepstack_features_are_added_after_each_of_the_first_layers():
    torch.manual_seed(0)
    layers = [Layer() for _ in range(3)]
    positions, hidden = torch.arange(5.0), torch.randn(5, 8)
    features = torch.randn(2, 5, 8)
    wanted: Any = (hidden, None)
    for number, layer in enumerate(layers):
        wanted = layer(positions, *wanted)
        if number < 2:
            wanted = (wanted[0] + features[number], wanted[1])
    names = (f"deepstack_input_embeds_{level}" for level in range(2))
    deepstack = IntermediateTensors(dict(zip(names, features, strict=True)))
    *got, stream = _Segment(layers=layers).run(positions, hidden, None, deepstack)
    assert stream is None
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 3])
def test_a_segment_keeps_the_stream_that_its_last_layer_gets(count):
    torch.manual_seed(0)
    *first, last = [Layer() for _ in range(count)]
    positions, hidden = torch.arange(5.0), torch.randn(5, 8)
    before: Any = (hidden, None)
    for layer in first:
        before = layer(positions, *before)
    wanted = before[0] if before[1] is None else before[0] + before[1]
    segment = _Segment(layers=[*first, last], keeps_input=True)
    stream = segment.run(positions, hidden, None)[2]
    assert stream is not None
    assert torch.equal(stream, wanted)
