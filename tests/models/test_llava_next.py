"""LLaVA-NeXT's encoder with a tower of one layer. No engine runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_llava import HIDDEN, SIDE, run_tower, set_up_tower
from tests.models.tiled import (
    TILE,
    Selections,
    assert_kept_tokens_equal_vllms,
    images_of,
    inputs_on,
)
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.llava_next import PrunedLlavaNextForConditionalGeneration
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grid, token_places
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, SelectorName

BASE = Grid(SIDE, SIDE)
SIZES = [(100, 200), (200, 100), (200, 180), (100, 200)]
"""(height, width) of images; the second has one tile above another, the third has four."""
GRIDS = [
    (BASE, Grid(6, 12, row_marks=True)),
    (BASE, Grid(12, 6, row_marks=True)),
    (BASE, Grid(12, 10, row_marks=True)),
    (BASE, Grid(6, 12, row_marks=True)),
]
TILES = [3, 3, 5, 3]
ENCODER_SELECTORS = [name for name in SELECTOR_NAMES if SELECTORS[name].prunes_encoder]


class OneLayerLlavaNext(PrunedLlavaNextForConditionalGeneration):
    """The parts of LLaVA-NeXT that encode images, with random weights."""

    def __init__(self, selector: SelectorName) -> None:
        nn.Module.__init__(self)
        set_up_tower(self, selector)
        self.config: Any = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=TILE, patch_size=14),
            image_grid_pinpoints=[[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
        )
        self.image_newline = nn.Parameter(torch.rand(HIDDEN))
        self.set_up_tiles()

    def _embed_whole(self, kwargs):
        """As vLLM's model encodes images, without its checks of the inputs."""
        return [
            LlavaNextForConditionalGeneration._merge_image_patch_embeddings(
                self,
                size,
                self.multi_modal_projector(run_tower(self, tiles)),
                strategy="spatial_unpad",
            )
            for tiles, size in zip(kwargs["pixel_values"], kwargs["image_sizes"], strict=True)
        ]

    def _image_pixels_to_features(self, tower, pixel_values):
        return run_tower(self, pixel_values)


@torch.inference_mode()
@pytest.mark.parametrize("share", [0.4, 0.99])
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_kept_tokens_equal_those_of_the_whole_encoder(selector, share):
    torch.manual_seed(0)
    model, inputs, images = (
        OneLayerLlavaNext(selector),
        inputs_on(torch.device("cpu"), TILES, SIZES),
        images_of(GRIDS, 1, selector, share),
    )
    labels = assert_kept_tokens_equal_vllms(model, inputs, images)
    assert (labels is not None) == (selector == "vitcop")


@torch.inference_mode()
def test_row_marks_are_dropped_before_any_other_token():
    torch.manual_seed(0)
    model, inputs = OneLayerLlavaNext("vitcop"), inputs_on(torch.device("cpu"), TILES, SIZES)
    is_mark = torch.from_numpy(token_places(GRIDS[0]).is_mark)
    num_parts = int((~is_mark).sum())
    for n1, marks in ((num_parts - 1, 0), (num_parts, 0), (num_parts + 2, 2)):
        counts = VisualTokenCounts(len(is_mark), 4, (n1, 10, 3))
        images = [ImageShape(counts, grids) for grids in GRIDS[:1]]
        sink: Any = Selections()
        model._embed_pruned(model.slice_images(inputs, 0, 1), images, sink)
        (selection,) = sink.of_images
        assert int(is_mark[selection.patches].sum()) == marks
        assert (selection.saliency[is_mark] == 0).all()
        assert (selection.saliency[~is_mark] > 0).all()


@torch.inference_mode()
def test_tiles_that_vllm_added_as_padding_are_not_encoded():
    torch.manual_seed(0)
    model, inputs, images = (
        OneLayerLlavaNext("vitcop"),
        inputs_on(torch.device("cpu"), TILES, SIZES),
        images_of(GRIDS, 1, "vitcop"),
    )
    padded = torch.zeros(len(TILES), 7, 3, TILE, TILE)
    for tiles, pixels in zip(padded, inputs["pixel_values"], strict=True):
        tiles[: len(pixels)] = pixels
    encoded: list[int] = []
    model.embed.register_forward_hook(lambda _, __, output: encoded.append(len(output)))
    expected = model._embed_pruned(inputs, images)
    got = model._embed_pruned(inputs | {"pixel_values": padded}, images)
    assert encoded == [sum(TILES), sum(TILES)]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        model = OneLayerLlavaNext(selector)
    images = images_of(GRIDS, 1, selector)
    embeddings = model._embed_pruned(inputs_on(CUDA, TILES, SIZES), images)
    for (counts, *_), embedding in zip(images, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN + bool(counts.centres))
