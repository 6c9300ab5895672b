"""LLaVA-OneVision's encoder with a tower of one layer. No engine runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_llava import HIDDEN, SIDE, set_up_tower
from tests.models.tiled import (
    TILE,
    Selections,
    assert_kept_tokens_equal_vllms,
    images_of,
    inputs_on,
)
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.llava_onevision import PrunedLlavaOnevisionForConditionalGeneration
from vitcop_vllm.models.stage_one import ImageShape, VideoShape
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, SelectorName

SIZES = [(300, 300), (84, 168), (250, 170), (300, 300)]
"""(height, width) of images; 16 tiles are scaled down to about nine, two and nine are not."""
TILES = [17, 3, 10, 17]
BASE = Grid(SIDE, SIDE)
GRIDS = [
    (BASE, Grid(18, 18, row_marks=True)),
    (BASE, Grid(6, 12, row_marks=True)),
    (BASE, Grid(18, 12, row_marks=True)),
    (BASE, Grid(18, 18, row_marks=True)),
]
ENCODER_SELECTORS = [
    name
    for name in SELECTOR_NAMES
    if SELECTORS[name].prunes_encoder and not SELECTORS[name].needs_cls
]


class OneLayerLlavaOnevision(PrunedLlavaOnevisionForConditionalGeneration):
    """The parts of LLaVA-OneVision that encode images, with random weights."""

    def __init__(self, selector: SelectorName, tile: int = TILE) -> None:
        nn.Module.__init__(self)
        set_up_tower(self, selector)
        pinpoints = [
            [rows * TILE, columns * TILE] for rows in range(1, 5) for columns in (1, 2, 3, 4)
        ]
        self.config: Any = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=tile, patch_size=14),
            image_grid_pinpoints=pinpoints,
        )
        self.image_newline = nn.Parameter(torch.rand(HIDDEN))
        self.set_up_tiles()

    def _embed_whole(self, kwargs):
        """As vLLM's model encodes images, or frames, without its checks of the inputs."""
        if (frames := kwargs.get("frames")) is not None:
            features = self._image_pixels_to_features(None, frames)
            return self.apply_pooling(self.multi_modal_projector(features))
        return [
            LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings(
                self,
                size,
                self.multi_modal_projector(self._image_pixels_to_features(None, tiles)),
                image_newline=self.image_newline,
                strategy="spatial_unpad",
            )
            for tiles, size in zip(kwargs["pixel_values"], kwargs["image_sizes"], strict=True)
        ]

    def _image_pixels_to_features(self, tower, pixel_values):
        patches = nn.functional.unfold(pixel_values, 14, stride=14).mT
        return self.vision_tower.vision_model.encoder.layers[-1](self.embed(patches))


@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_kept_tokens_equal_those_of_the_whole_encoder(selector):
    torch.manual_seed(0)
    model, inputs, images = (
        OneLayerLlavaOnevision(selector),
        inputs_on(torch.device("cpu"), TILES, SIZES),
        images_of(GRIDS, 3, selector),
    )
    assert_kept_tokens_equal_vllms(model, inputs, images)


@torch.inference_mode()
def test_tokens_are_averages_of_the_patches_that_vllm_averages():
    torch.manual_seed(0)
    model = OneLayerLlavaOnevision("vitcop")
    for tiles, (height, width) in zip(TILES, SIZES, strict=True):
        rows = torch.rand(tiles, SIDE * SIDE, 3)
        merged = model.merge_tiles(rows, height, width, torch.zeros(3))
        patches, weights = model._find_sources(tiles, height, width)
        assert patches.shape[1] == (4 if tiles == 17 else 1)
        averages = (rows.flatten(0, 1)[patches.clamp(min=0)] * weights[:, :, None]).sum(dim=1)
        torch.testing.assert_close(averages, merged)


@torch.inference_mode()
@pytest.mark.parametrize("side", [5, 6, 27])
def test_tokens_of_a_frame_are_averages_of_the_patches_that_vllm_averages(side):
    model = OneLayerLlavaOnevision("vitcop", 14 * side)
    rows = torch.rand(1, side * side, 3)
    patches, weights = model._frame_sources
    averages = (rows[0, patches] * weights[:, :, None]).sum(dim=1)
    torch.testing.assert_close(averages, model.apply_pooling(rows)[0])


def videos_of(selector: SelectorName) -> list[VideoShape]:
    """Two pruned videos, whose frames keep different numbers of tokens, and an unpruned one."""
    centres = 3 if selector == "vitcop" else 0
    counts = [
        VisualTokenCounts(9, centres, (5, 4, 2)),
        VisualTokenCounts.unpruned(9),
        VisualTokenCounts(9, centres, (3, 2, 1)),
    ]
    return [
        VideoShape(ImageShape(one, (Grid(3, 3),)), num_frames, tail=1)
        for one, num_frames in zip(counts, FRAMES, strict=True)
    ]


FRAMES = (3, 2, 4)
assert SIDE == 6, "frames have 3 x 3 tokens"


@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_videos_have_the_kept_tokens_of_their_frames_and_the_token_after_them(selector):
    torch.manual_seed(0)
    model = OneLayerLlavaOnevision(selector)
    pixels = [torch.rand(num_frames, 3, TILE, TILE) for num_frames in FRAMES]
    videos = videos_of(selector)
    model._encoder_tokens = 4 * 9  # some frames of two videos are encoded together
    embeddings = model._embed_videos(videos, {"pixel_values_videos": pixels})
    has_labels = selector == "vitcop"
    for shape, frames, embedding in zip(videos, pixels, embeddings, strict=True):
        counts, _ = shape.frame
        n1, is_pruned = counts.stages[0], counts.is_pruned
        width = HIDDEN + (has_labels and is_pruned)
        assert embedding.shape == (n1 * len(frames) + 1, width)
        *of_frames, end = embedding.split(n1)
        assert torch.equal(end[0, :HIDDEN], model.image_newline)
        for frame, rows in zip(frames[:, None], of_frames, strict=True):
            inputs = {"frames": frame}
            sink: Any = Selections()
            (alone,) = model._embed_pruned(inputs, [shape.frame], sink)
            torch.testing.assert_close(rows[:, :HIDDEN], alone[:, :HIDDEN])
            assert torch.equal(
                rows[:, HIDDEN:].view(torch.int32), alone[:, HIDDEN:].view(torch.int32)
            )
            (selection,) = sink.of_images
            index = range(n1) if selection is None else selection.patches.tolist()
            assert (selection is not None) == is_pruned
            assert len({*index}) == n1
            torch.testing.assert_close(rows[:, :HIDDEN], model._embed_whole(inputs)[0, [*index]])


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        model = OneLayerLlavaOnevision(selector)
    images = images_of(GRIDS, 3, selector)
    embeddings = model._embed_pruned(inputs_on(CUDA, TILES, SIZES), images)
    for (counts, *_), embedding in zip(images, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN + bool(counts.centres))


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_encoding_videos_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        model = OneLayerLlavaOnevision(selector)
    videos = videos_of(selector)
    pixels = [torch.rand(num_frames, 3, TILE, TILE, device=CUDA) for num_frames in FRAMES]
    embeddings = model._embed_videos(videos, {"pixel_values_videos": pixels})
    for shape, embedding in zip(videos, embeddings, strict=True):
        assert len(embedding) == shape.num_kept + 1
