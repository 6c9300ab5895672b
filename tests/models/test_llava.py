"""LLaVA's encoder with a tower of one layer. No engine runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_clip_rows import WIDTH, Layer
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.llava import PrunedLlavaForConditionalGeneration
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, PruningSettings, SelectorName

SIDE = 6
V = SIDE * SIDE
HEADS = 2
HIDDEN = 12


class OneLayerLlava(PrunedLlavaForConditionalGeneration):
    """The parts of LLaVA that encode images, with random weights."""

    def __init__(self, selector: SelectorName) -> None:
        nn.Module.__init__(self)
        set_up_tower(self, selector)

    def _embed_whole(self, kwargs):
        features = self._image_pixels_to_features(self.vision_tower, kwargs["pixel_values"])
        return [*self.multi_modal_projector(features)]

    def _image_pixels_to_features(self, tower, pixel_values):
        return run_tower(self, pixel_values)


def set_up_tower(model: Any, selector: SelectorName) -> None:
    """Give a model the parts that encode images, with random weights."""
    settings = PruningSettings(selector=selector)
    config = SimpleNamespace(pruning=settings.model_dump(mode="json"))
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, uses_mrope=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
    )
    model._set_up_stage_one(vllm_config, HIDDEN)
    layer = Layer(AttentionBackendEnum.TORCH_SDPA)
    attention: Any = layer.self_attn
    attention.head_dim, attention.scale, attention.tp_size = WIDTH // HEADS, 0.5, 1
    encoder = SimpleNamespace(layers=[layer])
    model.vision_tower = SimpleNamespace(vision_model=SimpleNamespace(encoder=encoder))
    model.embed = nn.Linear(3 * 14 * 14, WIDTH)
    model.multi_modal_projector = nn.Linear(WIDTH, HIDDEN)


def run_tower(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(S, 3, height, width) to (S, P, C)."""
    patches = nn.functional.unfold(pixels, 14, stride=14).mT
    hidden = model.embed(nn.functional.pad(patches, (0, 0, 1, 0)))
    features: torch.Tensor = model.vision_tower.vision_model.encoder.layers[-1](hidden)[:, 1:]
    return features


def images_of(selector: SelectorName) -> list[ImageShape]:
    """Four images with three different counts. ViTCoP clusters the pruned images."""
    pruned, milder = (
        VisualTokenCounts(V, 4 if selector == "vitcop" else 0, stages)
        for stages in ((20, 10, 2), (30, 12, 3))
    )
    counts = [pruned, VisualTokenCounts.unpruned(V), milder, pruned]
    return [ImageShape(image_counts, (Grid(SIDE, SIDE),)) for image_counts in counts]


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", [s for s in SELECTOR_NAMES if SELECTORS[s].prunes_encoder])
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        llava = OneLayerLlava(selector)
    images = images_of(selector)
    pixels = torch.rand(len(images), 3, 14 * SIDE, 14 * SIDE, device=CUDA)
    embeddings = llava._embed_pruned({"pixel_values": pixels}, images)
    for (counts, *_), embedding in zip(images, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN + bool(counts.centres))
