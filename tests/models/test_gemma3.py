"""Gemma 3's encoder with a tower of one layer. No engine runs."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_clip_rows import WIDTH
from tests.models.test_llava import HIDDEN, set_up_tower
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.gemma3 import PrunedGemma3ForConditionalGeneration
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, SelectorName

SIDE, SQUARE = 12, 3
V = (SIDE // SQUARE) ** 2
STAGE_ONE_SELECTORS = [
    name
    for name in SELECTOR_NAMES
    if SELECTORS[name].prunes_encoder
    and not (SELECTORS[name].prunes_decoder or SELECTORS[name].needs_cls)
]


def images_of(tokens: list[int], grids: list[Grid]) -> list[ImageShape]:
    """Images of which Stage I keeps so many tokens."""
    return [
        ImageShape(VisualTokenCounts(grid.num_tokens, 0, (kept,) * 3), (grid,))
        for kept, grid in zip(tokens, grids, strict=True)
    ]


class Projector(nn.Module):
    """An average over squares of patches, and a projection."""

    patches_per_image, kernel_size = SIDE, SQUARE

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        grid = features.mT.unflatten(-1, (SIDE, SIDE))
        pooled = nn.functional.avg_pool2d(grid, SQUARE).flatten(2).mT
        projected: torch.Tensor = self.projection(pooled)
        return projected


class OneLayerGemma3(PrunedGemma3ForConditionalGeneration):
    """The parts of Gemma 3 that encode images, with random weights."""

    def __init__(self, selector: SelectorName) -> None:
        nn.Module.__init__(self)
        set_up_tower(self, selector)
        self.multi_modal_projector = Projector()

    def _embed_whole(self, kwargs: Any) -> Any:
        pixels = kwargs["pixel_values"]
        return [*self.multi_modal_projector(self._image_pixels_to_features(None, pixels))]

    def _image_pixels_to_features(self, tower: Any, pixels: torch.Tensor) -> torch.Tensor:
        this: Any = self
        patches = nn.functional.unfold(pixels, 14, stride=14).mT
        features: torch.Tensor = this.vision_tower.vision_model.encoder.layers[-1](
            this.embed(patches)
        )
        return features


IMAGES = images_of([7, V, 11, 7], [Grid(SIDE // SQUARE, SIDE // SQUARE)] * 4)


def pixels_on(device: torch.device) -> torch.Tensor:
    return torch.rand(len(IMAGES), 3, 14 * SIDE, 14 * SIDE, device=device)


@torch.inference_mode()
def test_kept_tokens_have_the_embeddings_of_the_whole_image():
    gemma, inputs = OneLayerGemma3("grid"), {"pixel_values": pixels_on(torch.device("cpu"))}
    whole = gemma._embed_whole(inputs)
    for embedding, of_image in zip(gemma._embed_pruned(inputs, IMAGES), whole, strict=True):
        distances = torch.cdist(embedding[:, :HIDDEN], of_image)
        assert (distances.min(dim=1).values < 1e-5).all()
        assert distances.argmin(dim=1).diff().min() > 0


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", STAGE_ONE_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        gemma = OneLayerGemma3(selector)
    embeddings = gemma._embed_pruned({"pixel_values": pixels_on(CUDA)}, IMAGES)
    for (counts, _), embedding in zip(IMAGES, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN)
