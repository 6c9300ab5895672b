"""Which rows of a vision tower's last layer are computed, without an engine."""

from itertools import chain

import pytest
import torch
from torch import nn

from vitcop_vllm.models.patch_choice import (
    ChosenPatches,
    batch_of,
    members_of,
    rows_that_stay,
    watching,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts

V, WIDTH = 6, 8
PRUNED = VisualTokenCounts(V, 1, (3, 2, 1))
MILDER = VisualTokenCounts(V, 2, (4, 3, 2))
WHOLE = VisualTokenCounts.unpruned(V)


class Attention(nn.Module):
    """Any mixing of tokens will do, and like vLLM's its projection also returns a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Projection()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(hidden)[0].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.linear(hidden), None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(hidden)
        return hidden + self.mlp(hidden)


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer().eval()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(4, 1 + V, WIDTH)


def kept(*index: list[int]) -> ChosenPatches:
    view: object = None
    return ChosenPatches(view, torch.tensor(index), None)  # type: ignore[arg-type]


def test_rows_that_stay_are_those_of_each_picture_behind_its_cls():
    members = members_of([PRUNED, WHOLE, MILDER, PRUNED])
    assert members == {PRUNED: [0, 3], WHOLE: [1], MILDER: [2]}
    chosen = {PRUNED: kept([0, 2, 5], [1, 3, 4]), MILDER: kept([0, 1, 2, 3])}
    rows = rows_that_stay(members, chosen, torch.device("cpu"))
    first = {0: [1, 3, 6], 1: [8, 9, 10, 11, 12, 13], 2: [15, 16, 17, 18], 3: [23, 25, 26]}
    assert sorted(rows.tolist()) == [*chain(*first.values())]


@torch.inference_mode()
def test_rows_that_stay_come_out_as_they_do_otherwise(layer, hidden):
    rows = torch.tensor([1, 3, 8, 13, 27])
    seen = []
    layer.mlp[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    whole = layer(hidden).flatten(0, 1)
    with watching(layer, lambda _: rows):
        some = layer(hidden)
    assert seen == [(4, 1 + V, WIDTH), (5, WIDTH)]
    assert some.shape == hidden.shape
    torch.testing.assert_close(some.flatten(0, 1)[rows], whole[rows])


@torch.inference_mode()
def test_it_tells_what_the_layer_attends_by_and_may_compute_everything(layer, hidden):
    outputs: list[torch.Tensor] = []
    with watching(layer, outputs.append):
        watched = layer(hidden)
    assert torch.equal(outputs[0], layer.self_attn.qkv_proj(hidden)[0])
    assert torch.equal(watched, layer(hidden))


@torch.inference_mode()
def test_nothing_is_left_of_it(layer, hidden):
    whole = layer(hidden)
    with pytest.raises(IndexError), watching(layer, lambda _: torch.tensor([4 * (1 + V)])):
        layer(hidden)
    assert torch.equal(layer(hidden), whole)


def test_all_pictures_of_a_batch_are_no_copy():
    rows = torch.randn(3, 2)
    assert batch_of(rows, [0, 1, 2]) is rows
    assert torch.equal(batch_of(rows, [0, 2]), rows[[0, 2]])
