"""How a boundary's rows are chosen, without an engine."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from tests.pruning import oracle
from vitcop_vllm.models import staged_decoder
from vitcop_vllm.models.staged_decoder import (
    _LayerBefore,
    _select_rows,
    mean_over_ranks,
)
from vitcop_vllm.models.stages import layers_by_stage
from vitcop_vllm.pruning.budgets import SELECTORS
from vitcop_vllm.pruning.kernel_set import TORCH
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.worker.step import ScheduledRequest, SpanGroup, build_step

V, KEPT = 20, 13
COUNTS = VisualTokenCounts(V, 0, (V, KEPT, KEPT))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setattr(staged_decoder, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def group() -> SpanGroup:
    """Text of another request, then a prompt of two pictures that has answers already."""
    plan = RequestPlan((VisualSpan(2, COUNTS), VisualSpan(3 + V, COUNTS)))
    requests = [
        ScheduledRequest(None, 0, 7, 7),
        ScheduledRequest(plan, 0, 2 * V + 9, 2 * V + 6),
        ScheduledRequest(None, 0, 4, 4),
    ]
    step = build_step(requests, torch.device("cpu"))
    assert step is not None
    assert step.forward is not None
    (group,) = step.forward.groups
    return group


@pytest.fixture
def layer() -> _LayerBefore:
    torch.manual_seed(0)
    rows = 7 + 2 * V + 9 + 4
    return _LayerBefore(
        0.5,
        torch.randn(rows, 4, 8),
        torch.randn(rows, 2, 8),
        torch.randn(rows, 20),
        torch.randn(rows, 20),
    )


def test_rows_that_fastv_keeps(group, layer):
    rows, _, stream = _select_rows(SELECTORS["fastv"], group, 1, layer, [], torch.ones(20), TORCH)
    assert stream is None
    prompt = slice(7, 7 + 2 * V + 6)
    keys = layer.key[prompt].numpy()
    query = layer.query[prompt][-1].numpy()
    for member, offset in enumerate((2, 3 + V)):
        visual = list(range(offset, offset + V))
        kept = oracle.last_token_attention(query, keys, 0.5, visual, KEPT)
        assert rows[member].tolist() == [7 + offset + i for i in kept]


def test_rows_that_dart_keeps(group, layer):
    weight = torch.rand(20)
    rows, _, stream = _select_rows(SELECTORS["dart"], group, 1, layer, [], weight, TORCH)
    assert stream is None
    for member, offset in enumerate((2, 3 + V)):
        visual = slice(7 + offset, 7 + offset + V)
        # A cosine does not mind the length that the norm divides by.
        states = ((layer.hidden + layer.residual)[visual] * weight).numpy()
        kept = oracle.least_duplicated(layer.key[visual].numpy(), states, KEPT)
        assert rows[member].tolist() == [7 + offset + i for i in kept]


@pytest.mark.parametrize("selector", ["fastv", "dart"])
def test_where_nothing_is_lost_nothing_is_chosen(group, layer, selector):
    rows, _, stream = _select_rows(SELECTORS[selector], group, 2, layer, [], torch.ones(20), TORCH)
    assert stream is None
    assert torch.equal(rows, group.rows(1))


def test_a_selector_cannot_drop_where_it_has_no_function(layer):
    plan = RequestPlan((VisualSpan(0, VisualTokenCounts(V, 0, (V, 5, 3))),))
    step = build_step([ScheduledRequest(plan, 0, V + 2, V + 2)], torch.device("cpu"))
    assert step is not None
    assert step.forward is not None
    with pytest.raises(AssertionError, match="no token may be lost before stage 2"):
        _select_rows(
            SELECTORS["fastv"], step.forward.groups[0], 2, layer, [], torch.ones(20), TORCH
        )


class Layer(nn.Module):
    """As vLLM's Llama has it: a norm adds its two inputs up."""

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
def test_the_stages_are_the_layers_wherever_a_boundary_cuts(selector, boundaries):
    torch.manual_seed(0)
    layers = [Layer() for _ in range(4)]
    positions, hidden = torch.arange(5.0), torch.randn(5, 8)
    ours: Any
    theirs: Any
    stages = layers_by_stage(layers, boundaries, SELECTORS[selector])
    ours, theirs = (hidden, None), (hidden, None)
    for layer in layers:
        theirs = layer(positions, *theirs)
    for layer in chain(*stages):
        ours = layer(positions, *ours)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("selector", "cuts"),
    [("vitcop", [2]), ("key_norm", [1, 2]), ("fastv", [1]), ("dart", []), ("cls", [])],
)
def test_a_boundary_lies_before_the_mlp_where_the_selector_lets_it(selector, cuts):
    layers = [Layer() for _ in range(6)]
    stages = layers_by_stage(layers, (2, 4), SELECTORS[selector])
    assert [len(stage) for stage in stages] == [2, 2 + (1 in cuts), 2 + (2 in cuts)]
    for stage, layer in enumerate((layers[1], layers[3]), start=1):
        assert (stages[stage - 1][-1] is layer) is (stage not in cuts)


def test_the_mean_over_ranks_is_their_sum_divided(monkeypatch):
    held = torch.rand(3, 4).T
    assert mean_over_ranks(held, 1) is held

    def all_reduce(x):
        assert x.is_contiguous()
        return x + 2 * x

    monkeypatch.setattr(staged_decoder, "tensor_model_parallel_all_reduce", all_reduce)
    torch.testing.assert_close(mean_over_ranks(held, 2), 1.5 * held)
