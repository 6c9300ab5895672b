"""Which rows of a vision tower's last layer are computed, without an engine."""

from itertools import chain

import pytest
import torch
from torch import nn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.device_guard import CUDA, no_host_sync
from vitcop_vllm.models.patch_choice import (
    ChosenPatches,
    RowsThatStay,
    batch_of,
    members_of,
    rows_that_stay,
    take,
    watching,
)
from vitcop_vllm.pruning.plan import VisualTokenCounts

V, WIDTH = 6, 8
PRUNED = VisualTokenCounts(V, 1, (3, 2, 1))
MILDER = VisualTokenCounts(V, 2, (4, 3, 2))
WHOLE = VisualTokenCounts.unpruned(V)


class Attention(nn.Module):
    """As vLLM's: its projections also return a bias."""

    def __init__(self, backend: AttentionBackendEnum) -> None:
        super().__init__()
        self.qkv_proj = Projection(WIDTH, 3 * WIDTH)
        self.attn = Mixing(backend)
        self.out_proj = Projection(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.attn(*self.qkv_proj(hidden)[0].chunk(3, dim=-1))
        output: torch.Tensor = self.out_proj(mixed)[0]
        return output


class Mixing(nn.Module):
    def __init__(self, backend: AttentionBackendEnum) -> None:
        super().__init__()
        self.attn_backend = backend

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.attn_backend != AttentionBackendEnum.TORCH_SDPA:
            assert query.shape == key.shape, "as vLLM's FlashAttention wrapper takes for granted"
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Projection(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.linear(hidden), None


class Layer(nn.Module):
    def __init__(self, backend: AttentionBackendEnum) -> None:
        super().__init__()
        self.self_attn = Attention(backend)
        self.layer_norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(hidden)
        return hidden + self.mlp(self.layer_norm2(hidden))


@pytest.fixture(params=[AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.FLASH_ATTN])
def layer(request: pytest.FixtureRequest) -> Layer:
    torch.manual_seed(0)
    return Layer(request.param).eval()


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(4, 1 + V, WIDTH)


def kept(*index: list[int]) -> ChosenPatches:
    view: object = None
    return ChosenPatches(view, torch.tensor(index), None)  # type: ignore[arg-type]


def kept_on(device: torch.device, counts: VisualTokenCounts, pictures: int) -> ChosenPatches:
    index = torch.arange(counts.stages[0], device=device).expand(pictures, -1)
    return ChosenPatches(None, index, None)  # type: ignore[arg-type]


MEMBERS = members_of([PRUNED, WHOLE, MILDER, PRUNED])
CHOSEN = {PRUNED: kept([0, 2, 5], [1, 3, 4]), MILDER: kept([0, 1, 2, 3])}
OF_PICTURE = [[1, 3, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [2, 4, 5]]


def test_rows_that_stay_are_those_of_each_picture_behind_its_cls():
    assert MEMBERS == {PRUNED: [0, 3], WHOLE: [1], MILDER: [2]}
    rows = rows_that_stay(MEMBERS, CHOSEN, torch.device("cpu"))
    padded = [index + [0] * (V - len(index)) for index in OF_PICTURE]
    assert rows.of_picture.tolist() == padded
    assert rows.unpadded is not None
    assert rows.of_picture.flatten()[rows.unpadded].tolist() == [*chain(*OF_PICTURE)]
    assert rows.of_batch.tolist() == [
        number * (1 + V) + row for number, index in enumerate(OF_PICTURE) for row in index
    ]


def test_equal_counts_need_no_padding():
    rows = rows_that_stay({PRUNED: [0, 1]}, CHOSEN, torch.device("cpu"))
    assert rows.of_picture.tolist() == [OF_PICTURE[0], OF_PICTURE[3]]
    assert rows.unpadded is None
    assert rows.of_batch.tolist() == [1, 3, 6, 9, 11, 12]


@torch.inference_mode()
@pytest.mark.parametrize("members", [MEMBERS, {MILDER: [0]}], ids=["mixed", "one"])
def test_rows_that_stay_come_out_as_they_do_otherwise(layer, hidden, members):
    hidden = hidden[: sum(map(len, members.values()))]
    rows = rows_that_stay(members, CHOSEN, torch.device("cpu"))
    computed: list[int] = []
    for part in (layer.self_attn.out_proj, layer.layer_norm2, layer.mlp):
        part.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0][..., 0].numel()))
    whole = layer(hidden).flatten(0, 1)
    assert computed == [hidden[..., 0].numel()] * 3
    computed.clear()
    with watching(layer, lambda _: rows):
        some = layer(hidden)
    assert computed == [len(rows.of_batch)] * 3
    assert some.shape == hidden.shape
    torch.testing.assert_close(some.flatten(0, 1)[rows.of_batch], whole[rows.of_batch])


@torch.inference_mode()
def test_attention_that_can_computes_only_rows_that_stay(layer, hidden):
    rows = rows_that_stay({PRUNED: [0, 1]}, CHOSEN, torch.device("cpu"))
    queries: list[int] = []
    layer.self_attn.attn.register_forward_hook(
        lambda _, __, output: queries.append(output.shape[1])
    )
    with watching(layer, lambda _: rows):
        layer(hidden[:2])
    sdpa = layer.self_attn.attn.attn_backend == AttentionBackendEnum.TORCH_SDPA
    assert queries == [3 if sdpa else 1 + V]


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
    beyond = torch.tensor([[1 + V]])
    with (
        pytest.raises(IndexError),
        watching(layer, lambda _: RowsThatStay(beyond, None, beyond.flatten())),
    ):
        layer(hidden[:1])
    assert torch.equal(layer(hidden), whole)


def test_all_pictures_of_a_batch_are_no_copy():
    rows = torch.randn(3, 2)
    assert batch_of(rows, [0, 1, 2]) is rows
    assert torch.equal(batch_of(rows, [0, 2]), rows[[0, 2]])


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize(
    "backend", [AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.FLASH_ATTN]
)
@pytest.mark.parametrize("members", [MEMBERS, {MILDER: [0]}], ids=["mixed", "one"])
def test_nothing_waits_for_the_gpu(backend, members):
    chosen = {counts: kept_on(CUDA, counts, len(members.get(counts, [0]))) for counts in CHOSEN}
    with torch.device(CUDA):
        layer = Layer(backend).eval()
    hidden = torch.randn(sum(map(len, members.values())), 1 + V, WIDTH, device=CUDA)
    with watching(layer, lambda _: rows_that_stay(members, chosen, CUDA)):
        output = layer(hidden)
    for counts, numbers in members.items():
        rows = batch_of(output, numbers)
        if counts in chosen:
            rows = take(rows, chosen[counts].index)
        assert rows.shape == (len(numbers), counts.stages[0] + (counts not in chosen), WIDTH)
