"""Encoders of Qwen-VL with towers of few blocks. No engine runs."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_clip_rows import Projection
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.qwen2_5_vl import PrunedQwen25ForConditionalGeneration
from vitcop_vllm.models.qwen3_vl import PrunedQwen3ForConditionalGeneration
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, PruningSettings, SelectorName

HEADS, HEAD_SIZE, WIDTH, HIDDEN, PATCHES = 2, 4, 8, 12, 4
GRIDS = [(1, 6, 10), (1, 8, 4), (1, 6, 10)]  # patches: 15, 8 and 15 visual tokens


class Mixing(nn.Module):
    scale = 0.5

    @staticmethod
    def lengths(num_patches: int) -> list[int]:
        """Patches of each image."""
        assert num_patches == sum(LENGTHS)
        return LENGTHS

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        lengths = self.lengths(query.shape[1])
        mixed = [
            nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts))
            for parts in zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
        ]
        return torch.cat([image.transpose(1, 2) for image in mixed], dim=1)


LENGTHS = [h * w for _, h, w in GRIDS]


class Attention(nn.Module):
    tp_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Projection(WIDTH, 3 * WIDTH)
        self.attn = Mixing()
        self.proj = Projection(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, cu_seqlens: object = None) -> torch.Tensor:
        qkv = self.qkv(hidden)[0].squeeze(1).unflatten(-1, (3, HEADS, HEAD_SIZE))
        query, key, value = (x[None] for x in qkv.unbind(1))
        mixed = self.attn(query=query, key=key, value=value)
        output: torch.Tensor = self.proj(mixed[0].flatten(1)[:, None])[0]
        return output


class FusedNorm(nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return nn.functional.layer_norm(total, total.shape[-1:]), total


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm2 = FusedNorm()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed, residual = self.norm2(x, residual=self.attn(x))
        output: torch.Tensor = residual + self.mlp(normed)
        return output


class Tower(nn.Module):
    """Like vLLM's tower: tokens are in another order until the last line restores image order."""

    spatial_merge_unit = PATCHES

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.merger = nn.Linear(PATCHES * WIDTH, HIDDEN)

    @property
    def device(self) -> torch.device:
        return self.merger.weight.device

    @staticmethod
    def get_rope_by_thw(t: int, h: int, w: int) -> Any:
        order = torch.arange(t * h * w // PATCHES).flip(0).roll(3)
        return None, None, order, None, None

    @staticmethod
    def invert_permutation(order: torch.Tensor) -> torch.Tensor:
        return order.argsort()

    def prepare_encoder_metadata(self, grids: list[list[int]]) -> dict[str, torch.Tensor]:
        first, orders, inverses = 0, [], []
        for grid in grids:
            order = self.get_rope_by_thw(*grid)[2]
            orders.append(first + order)
            inverses.append(first + order.argsort())
            first += len(order)
        return {
            "order": async_tensor_h2d(torch.cat(orders), device=self.device),
            "reverse_indices": async_tensor_h2d(torch.cat(inverses), device=self.device),
        }

    def forward(self, pixels: torch.Tensor, grid_thw: None, *, encoder_metadata: Any) -> Any:
        tokens = pixels.unflatten(0, (-1, PATCHES))[encoder_metadata["order"]]
        hidden = self.blocks[0](tokens.flatten(0, 1)[:, None])
        return self.merger(hidden.view(-1, PATCHES * WIDTH))[encoder_metadata["reverse_indices"]]


class PlainBlock(nn.Module):
    """A block of Qwen3-VL: no norm adds a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cu_seqlens: object) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cu_seqlens=cu_seqlens)
        output: torch.Tensor = x + self.mlp(self.norm2(x))
        return output


class Merger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PATCHES * WIDTH, HIDDEN)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, PATCHES * WIDTH)
        self.rows.append(x.shape[0])
        output: torch.Tensor = self.linear(x)
        return output


class DeepstackTower(nn.Module):
    """Like vLLM's tower of Qwen3-VL: features of some blocks follow the embeddings proper."""

    spatial_merge_unit = PATCHES

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(3)])
        self.merger = Merger()
        self.deepstack_visual_indexes = levels
        self.deepstack_merger_list = nn.ModuleList([Merger() for _ in levels])

    @property
    def device(self) -> torch.device:
        return self.merger.linear.weight.device

    def forward(self, pixels: torch.Tensor, grid_thw: object) -> torch.Tensor:
        hidden, features = pixels[:, None], []
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, cu_seqlens=grid_thw)
            if number in self.deepstack_visual_indexes:
                level = self.deepstack_visual_indexes.index(number)
                features.append(self.deepstack_merger_list[level](hidden))
        return torch.cat([self.merger(hidden), *features], dim=1)


def set_up(model: Any, selector: SelectorName, width: int, **others: Any) -> None:
    settings = PruningSettings(selector=selector, **others)
    config = SimpleNamespace(pruning=settings.model_dump(mode="json"))
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, uses_mrope=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )
    model._set_up_stage_one(vllm_config, width)


class ThreeBlockQwen3(PrunedQwen3ForConditionalGeneration):
    """The parts of Qwen3-VL that encode images, with random weights."""

    def __init__(self, selector: SelectorName, levels: list[int] | None = None) -> None:
        nn.Module.__init__(self)
        levels = [0, 1] if levels is None else levels
        set_up(self, selector, HIDDEN * (1 + len(levels)))
        self.visual: Any = DeepstackTower(levels)

    def _embed_whole(self, kwargs: Any) -> Any:
        grids = kwargs["image_grid_thw"].tolist()
        embedded = self.visual(kwargs["pixel_values"], grids)
        return embedded.split([t * h * w // PATCHES for t, h, w in grids])


class OneBlockQwen(PrunedQwen25ForConditionalGeneration):
    """The parts of Qwen2.5-VL that encode images, with random weights."""

    def __init__(self, selector: SelectorName) -> None:
        nn.Module.__init__(self)
        set_up(self, selector, HIDDEN)
        self.visual: Any = Tower()

    def _embed_whole(self, kwargs: Any) -> Any:
        grids = kwargs["image_grid_thw"].tolist()
        metadata = self.visual.prepare_encoder_metadata(grids)
        embedded = self.visual(kwargs["pixel_values"], None, encoder_metadata=metadata)
        return embedded.split([t * h * w // PATCHES for t, h, w in grids])


def images_of(selector: SelectorName) -> list[ImageShape]:
    """Two pruned images of different shapes, and an unpruned image."""
    centres = 3 if selector == "vitcop" else 0
    return [
        ImageShape(VisualTokenCounts(15, centres, (6, 4, 2)), (Grid(3, 5),)),
        ImageShape(VisualTokenCounts(8, centres, (5, 4, 1)), (Grid(4, 2),)),
        ImageShape(VisualTokenCounts.unpruned(15), (Grid(3, 5),)),
    ]


def inputs_on(device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.rand(sum(LENGTHS), WIDTH, device=device),
        "image_grid_thw": torch.tensor(GRIDS),
    }


ENCODER_SELECTORS = [
    name
    for name in SELECTOR_NAMES
    if SELECTORS[name].prunes_encoder and not SELECTORS[name].needs_cls
]


MODELS = [
    OneBlockQwen,
    ThreeBlockQwen3,
    pytest.param(partial(ThreeBlockQwen3, levels=[1, 2]), id="last block in deepstack"),
    pytest.param(partial(ThreeBlockQwen3, levels=[]), id="no deepstack"),
]


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_kept_tokens_equal_those_of_the_whole_encoder(selector, model):
    torch.manual_seed(0)
    qwen, inputs, images = model(selector), inputs_on(torch.device("cpu")), images_of(selector)
    computed: list[int] = []
    qwen.visual.blocks[-1].mlp.register_forward_hook(
        lambda _, __, output: computed.append(output.shape[0])
    )
    embeddings = qwen._embed_pruned(inputs, images)
    if not SELECTORS[selector].reads_embeddings:
        assert computed == [PATCHES * sum(shape.counts.stages[0] for shape in images)]
    plain, labels, places = qwen.columns.split(embeddings)
    assert (labels is not None) == (selector == "vitcop")
    assert places is not None
    first = 0
    for shape, embedding, whole in zip(images, plain, qwen._embed_whole(inputs), strict=True):
        own = places[first : first + len(embedding)]
        first += len(embedding)
        if not shape.counts.is_pruned:
            assert not own.any()
            torch.testing.assert_close(embedding, whole)
            continue
        index = own[:, 0] * shape.grids[0].columns + own[:, 1]
        assert index.tolist() == sorted({*index.tolist()})
        torch.testing.assert_close(embedding, whole[index])


@torch.inference_mode()
def test_deepstack_features_are_merged_for_kept_tokens_only():
    qwen, images = ThreeBlockQwen3("vitcop"), images_of("vitcop")
    qwen._embed_pruned(inputs_on(torch.device("cpu")), images)
    kept = sum(shape.counts.stages[0] for shape in images)
    mergers = [qwen.visual.merger, *qwen.visual.deepstack_merger_list]
    assert [merger.rows for merger in mergers] == [[kept]] * 3
    assert qwen.visual.deepstack_visual_indexes == [0, 1]
    assert "forward" not in vars(qwen.visual.blocks[-1])


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("model", [OneBlockQwen, ThreeBlockQwen3])
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector, model):
    with torch.device(CUDA):
        qwen = model(selector)
    images = images_of(selector)
    embeddings = qwen._embed_pruned(inputs_on(CUDA), images)
    for shape, embedding in zip(images, embeddings, strict=True):
        columns = shape.counts.is_pruned * (2 + bool(shape.counts.centres))
        assert embedding.shape == (shape.counts.stages[0], qwen.columns.width + columns)


@no_host_sync()
@torch.inference_mode()
def test_scattering_offsets_does_not_make_the_host_wait_for_the_gpu():
    from vitcop_vllm.models.pruned_encoder import _scatter_rows

    is_multimodal = torch.tensor([False, True, True, False, True])
    rows = torch.ones(3, 2, dtype=torch.int64, device=CUDA)
    assert _scatter_rows(rows, is_multimodal).shape == (2, 5)


def test_slicing_images_slices_their_patches():
    qwen, inputs = OneBlockQwen("vitcop"), inputs_on(torch.device("cpu"))
    part = qwen.slice_images(inputs, 1, 3)
    assert torch.equal(part["pixel_values"], inputs["pixel_values"][60:])
    assert part["image_grid_thw"].tolist() == [[*grid] for grid in GRIDS[1:]]


def test_images_are_batched_up_to_the_token_limit():
    qwen = OneBlockQwen("vitcop")
    qwen._encoder_tokens = 30
    images = images_of("vitcop")
    assert qwen._batches(images) == [(0, 2), (2, 3)]
    qwen._encoder_tokens = 7  # below every image's tokens: one image per batch
    assert qwen._batches(images) == [(0, 1), (1, 2), (2, 3)]
