"""The vision tower's last layer computes kept rows only. No engine runs."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.device_guard import CUDA, no_host_sync
from vitcop_vllm.models.clip_rows import KeptRows, LayerParts, kept_rows, skip_dropped_rows
from vitcop_vllm.models.stage_one import (
    ImageShape,
    KeptTokens,
    gather_rows,
    group_by_shape,
    select_items,
)
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts

V, WIDTH = 6, 8
PRUNED = ImageShape(VisualTokenCounts(V, 1, (3, 2, 1)), (Grid(2, 3),))
MILDER = ImageShape(VisualTokenCounts(V, 2, (4, 3, 2)), (Grid(2, 3),))
WHOLE = ImageShape(VisualTokenCounts.unpruned(V), (Grid(2, 3),))


class Attention(nn.Module):
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
            assert query.shape == key.shape, "vLLM's FlashAttention wrapper needs equal shapes"
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Projection(nn.Linear):
    """Returns (output, bias), like vLLM's parallel linear layers."""

    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), None


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


def kept(*index: list[int]) -> KeptTokens:
    return KeptTokens(torch.tensor(index), None, None)


def kept_on(device: torch.device, shape: ImageShape, images: int) -> KeptTokens:
    index = torch.arange(shape.counts.stages[0], device=device).expand(images, -1)
    return KeptTokens(index, None, None)


GROUPS = group_by_shape([PRUNED, WHOLE, MILDER, PRUNED])
KEPT = {PRUNED: kept([0, 2, 5], [1, 3, 4]), MILDER: kept([0, 1, 2, 3])}
OF_IMAGE = [[1, 3, 6], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [2, 4, 5]]


def test_kept_rows_of_an_image_are_offset_by_its_cls():
    assert GROUPS == {PRUNED: [0, 3], WHOLE: [1], MILDER: [2]}
    rows = kept_rows(GROUPS, KEPT, torch.device("cpu"))
    assert rows.of_image is not None
    padded = [index + [0] * (V - len(index)) for index in OF_IMAGE]
    assert rows.of_image.tolist() == padded
    assert rows.unpadded is not None
    assert rows.of_image.flatten()[rows.unpadded].tolist() == [*chain(*OF_IMAGE)]
    assert rows.of_batch.tolist() == [
        number * (1 + V) + row for number, index in enumerate(OF_IMAGE) for row in index
    ]


def test_equal_counts_need_no_padding():
    rows = kept_rows({PRUNED: [0, 1]}, KEPT, torch.device("cpu"))
    assert rows.of_image is not None
    assert rows.of_image.tolist() == [OF_IMAGE[0], OF_IMAGE[3]]
    assert rows.unpadded is None
    assert rows.of_batch.tolist() == [1, 3, 6, 9, 11, 12]


@torch.inference_mode()
@pytest.mark.parametrize("groups", [GROUPS, {MILDER: [0]}], ids=["mixed", "one"])
def test_kept_rows_equal_those_of_the_whole_layer(layer, hidden, groups):
    hidden = hidden[: sum(map(len, groups.values()))]
    rows = kept_rows(groups, KEPT, torch.device("cpu"))
    computed: list[int] = []
    for part in (layer.self_attn.out_proj, layer.layer_norm2, layer.mlp):
        part.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0][..., 0].numel()))
    whole = layer(hidden).flatten(0, 1)
    assert computed == [hidden[..., 0].numel()] * 3
    computed.clear()
    with skip_dropped_rows(LayerParts.of_clip(layer), lambda *_: rows):
        output = layer(hidden)
    assert computed == [len(rows.of_batch)] * 3
    assert output.shape == hidden.shape
    torch.testing.assert_close(output.flatten(0, 1)[rows.of_batch], whole[rows.of_batch])


@torch.inference_mode()
def test_attention_skips_dropped_queries_if_the_backend_allows_it(layer, hidden):
    rows = kept_rows({PRUNED: [0, 1]}, KEPT, torch.device("cpu"))
    queries: list[int] = []
    layer.self_attn.attn.register_forward_hook(
        lambda _, __, output: queries.append(output.shape[1])
    )
    with skip_dropped_rows(LayerParts.of_clip(layer), lambda *_: rows):
        layer(hidden[:2])
    sdpa = layer.self_attn.attn.attn_backend == AttentionBackendEnum.TORCH_SDPA
    assert queries == [3 if sdpa else 1 + V]


@torch.inference_mode()
def test_the_callback_gets_queries_and_keys_and_may_keep_all_rows(layer, hidden):
    inputs: list[torch.Tensor] = []
    all_rows = torch.arange(len(hidden) * (1 + V))

    def keep_all(query: torch.Tensor, key: torch.Tensor) -> KeptRows:
        inputs.extend((query, key))
        return KeptRows(torch.arange(1 + V).expand(len(hidden), -1), None, all_rows)

    with skip_dropped_rows(LayerParts.of_clip(layer), keep_all):
        output = layer(hidden)
    expected = layer.self_attn.qkv_proj(hidden)[0].chunk(3, dim=-1)[:2]
    assert all(torch.equal(got, part) for got, part in zip(inputs, expected, strict=True))
    assert torch.equal(output, layer(hidden))


@torch.inference_mode()
def test_the_layer_is_restored_after_an_error(layer, hidden):
    whole = layer(hidden)
    beyond = torch.tensor([[1 + V]])
    with (
        pytest.raises(IndexError),
        skip_dropped_rows(
            LayerParts.of_clip(layer), lambda *_: KeptRows(beyond, None, beyond.flatten())
        ),
    ):
        layer(hidden[:1])
    assert torch.equal(layer(hidden), whole)


def test_selecting_all_images_does_not_copy():
    rows = torch.randn(3, 2)
    assert select_items(rows, [0, 1, 2]) is rows
    assert torch.equal(select_items(rows, [0, 2]), rows[[0, 2]])


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize(
    "backend", [AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.FLASH_ATTN]
)
@pytest.mark.parametrize("groups", [GROUPS, {MILDER: [0]}], ids=["mixed", "one"])
def test_skipping_rows_does_not_make_the_host_wait_for_the_gpu(backend, groups):
    chosen = {shape: kept_on(CUDA, shape, len(groups.get(shape, [0]))) for shape in KEPT}
    with torch.device(CUDA):
        layer = Layer(backend).eval()
    hidden = torch.randn(sum(map(len, groups.values())), 1 + V, WIDTH, device=CUDA)
    with skip_dropped_rows(LayerParts.of_clip(layer), lambda *_: kept_rows(groups, chosen, CUDA)):
        output = layer(hidden)
    for shape, numbers in groups.items():
        rows = select_items(output, numbers)
        if shape in chosen:
            rows = gather_rows(rows, chosen[shape].index)
        length = shape.counts.stages[0] + (shape not in chosen)
        assert rows.shape == (len(numbers), length, WIDTH)
