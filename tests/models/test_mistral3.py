"""Mistral3's encoder with a tower of one layer. No engine runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_clip_rows import WIDTH, Projection
from tests.models.test_gemma3 import STAGE_ONE_SELECTORS, images_of
from tests.models.test_llava import HEADS, HIDDEN, set_up_tower
from vitcop_vllm.models.mistral3 import PrunedMistral3ForConditionalGeneration
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.settings import SelectorName

PATCH, MERGE = 14, 2
GRIDS = [Grid(3, 5), Grid(4, 2), Grid(3, 5), Grid(3, 5)]
IMAGES = images_of([4, 8, 6, 4], GRIDS)
LENGTHS = [grid.num_tokens * MERGE**2 for grid in GRIDS]


class Mixing(nn.Module):
    scale = 0.5

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **packing: Any
    ) -> torch.Tensor:
        mixed = [
            nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in parts))
            for parts in zip(*(x.split(LENGTHS, dim=1) for x in (query, key, value)), strict=True)
        ]
        return torch.cat([image.transpose(1, 2) for image in mixed], dim=1)


class Attention(nn.Module):
    tp_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Projection(WIDTH, 3 * WIDTH)
        self.attn = Mixing()
        self.o_proj = Projection(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, position_embeddings: Any, *packing: Any) -> Any:
        query, key, value = self.qkv_proj(x)[0].unflatten(-1, (3, HEADS, -1)).unbind(2)
        return self.o_proj(self.attn(query, key, value).flatten(2))[0], None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cos: Any, sin: Any, *packing: Any) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), (cos, sin), *packing)[0]
        output: torch.Tensor = x + self.feed_forward(self.ffn_norm(x))
        return output


class Tower(nn.Module):
    """Packs the patches of all images, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.transformer: Any = nn.Module()
        self.transformer.layers = nn.ModuleList([Layer()])

    def forward(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        patches = [nn.functional.unfold(image[None], PATCH, stride=PATCH).mT for image in images]
        x = self.embed(torch.cat(patches, dim=1))
        for layer in self.transformer.layers:
            # Not a call, as in vLLM's blocks.
            x = layer.forward(x, None, None, None, None, None)
        return x[0].split(LENGTHS)


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH * MERGE**2, HIDDEN)

    def forward(self, features: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        grids = [(height // PATCH, width // PATCH) for height, width in sizes]
        images = features.split([rows * columns for rows, columns in grids])
        merged = [
            nn.functional.unfold(image.T.unflatten(1, grid)[None], MERGE, stride=MERGE)[0].T
            for image, grid in zip(images, grids, strict=True)
        ]
        projected: torch.Tensor = self.projection(torch.cat(merged))
        return projected


class OneLayerMistral3(PrunedMistral3ForConditionalGeneration):
    """The parts of Mistral3 that encode images, with random weights."""

    def __init__(self, selector: SelectorName) -> None:
        nn.Module.__init__(self)
        set_up_tower(self, selector)
        self.vision_tower = Tower()
        self.multi_modal_projector = Projector()
        vision = SimpleNamespace(patch_size=PATCH)
        self.config = SimpleNamespace(spatial_merge_size=MERGE, vision_config=vision)

    def _embed_whole(self, kwargs: Any) -> Any:
        pixels = kwargs["pixel_values"]
        sizes = [image.shape[1:] for image in pixels]
        features = torch.cat(self.vision_tower(pixels))
        lengths = [grid.num_tokens for grid in GRIDS]
        return self.multi_modal_projector(features, sizes).split(lengths)


def inputs_on(device: torch.device) -> dict[str, Any]:
    side = PATCH * MERGE
    return {
        "pixel_values": [
            torch.rand(3, side * grid.rows, side * grid.columns, device=device) for grid in GRIDS
        ]
    }


@torch.inference_mode()
def test_kept_tokens_have_the_embeddings_of_the_whole_image():
    mistral, inputs = OneLayerMistral3("grid"), inputs_on(torch.device("cpu"))
    whole = mistral._embed_whole(inputs)
    for embedding, of_image in zip(mistral._embed_pruned(inputs, IMAGES), whole, strict=True):
        distances = torch.cdist(embedding[:, :HIDDEN], of_image)
        assert (distances.min(dim=1).values < 1e-5).all()
        assert distances.argmin(dim=1).diff().min() > 0
    layers: Any = mistral.vision_tower.transformer.layers
    assert "forward" not in vars(layers[-1])


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", STAGE_ONE_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        mistral = OneLayerMistral3(selector)
    embeddings = mistral._embed_pruned(inputs_on(CUDA), IMAGES)
    for (counts, _), embedding in zip(IMAGES, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN)
