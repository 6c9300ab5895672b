"""InternVL's encoder with a tower of one layer. No engine runs."""

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.models.internvl import InternVLChatModel

from tests.device_guard import CUDA, no_host_sync
from tests.models.test_clip_rows import Attention
from tests.models.test_llava import HEADS, HIDDEN, SIDE, set_up_tower
from tests.models.tiled import TILE, Selections, images_of
from tests.pruning.every_selector import SELECTORS
from vitcop_vllm.models.clip_rows import LayerParts
from vitcop_vllm.models.internvl import InternModel, LastLayer
from vitcop_vllm.models.processing import COUNTS_FIELD, shape_row
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grid, count_tokens
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import SELECTOR_NAMES, SelectorName
from vitcop_vllm.pruning.views import EncoderView

TOKENS = SIDE // 2
"""Visual tokens along a side of a tile."""

THUMBNAIL = Grid(TOKENS, TOKENS)
GRIDS = [
    (Grid(2 * TOKENS, 3 * TOKENS), THUMBNAIL),
    (Grid(3 * TOKENS, TOKENS), THUMBNAIL),
    (Grid(2 * TOKENS, 2 * TOKENS),),  # a model may have no thumbnails
    (Grid(2 * TOKENS, 3 * TOKENS), THUMBNAIL),
]
TILES = [7, 4, 4, 7]
ENCODER_SELECTORS = [name for name in SELECTOR_NAMES if SELECTORS[name].prunes_encoder]


class Model(InternModel, nn.Module):
    """The parts of InternVL that encode images, with random weights."""

    pixels_field = "pixel_values_flat"
    patches_per_side = SIDE
    downsample_ratio = 0.5
    pixel_shuffle = InternVLChatModel.pixel_shuffle
    extract_feature = InternVLChatModel.extract_feature

    def __init__(self, selector: SelectorName = "vitcop", ps_version: str = "v2") -> None:
        this: Any = self
        nn.Module.__init__(this)
        set_up_tower(self, selector)
        this.ps_version = ps_version
        this.mlp1 = nn.Linear(4 * this.multi_modal_projector.in_features, HIDDEN)
        self.set_up_tiles()

    @property
    def layer(self) -> Any:
        this: Any = self
        return this.vision_tower.vision_model.encoder.layers[-1]

    @property
    def last_layer(self) -> LastLayer:
        attention = self.layer.self_attn
        return LastLayer(
            LayerParts.of_clip(self.layer),
            attention.qkv_proj,
            lambda output: output[0].chunk(3, dim=-1)[1],
            attention.head_dim,
            attention.scale,
            1,
        )

    def vision_model(self, pixel_values: torch.Tensor) -> torch.Tensor:
        this: Any = self
        patches = nn.functional.unfold(pixel_values, 14, stride=14).mT
        hidden: torch.Tensor = self.layer(this.embed(nn.functional.pad(patches, (0, 0, 1, 0))))
        return hidden

    def run_tower(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.vision_model(tiles)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        this: Any = self
        embeddings: torch.Tensor = this.mlp1(features)
        return embeddings

    def _embed_whole(self, kwargs: Any) -> Any:
        this: Any = self
        sizes = kwargs["image_num_patches"].tolist()
        of_tiles = this.extract_feature(kwargs["pixel_values_flat"])
        return [tiles.flatten(0, 1) for tiles in of_tiles.split(sizes)]


def inputs_on(device: torch.device) -> dict[str, Any]:
    return {
        "pixel_values_flat": torch.rand(sum(TILES), 3, TILE, TILE, device=device),
        "image_num_patches": torch.tensor(TILES),
        "image_token_id": torch.tensor(5),
    }


@torch.inference_mode()
@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
@pytest.mark.parametrize("unpruned", [1, 2])
def test_kept_tokens_equal_vllms_and_have_the_order_of_the_prompt(selector, ps_version, unpruned):
    torch.manual_seed(0)
    model, inputs = Model(selector, ps_version), inputs_on(torch.device("cpu"))
    images = images_of(GRIDS, unpruned, selector)
    sink: Any = Selections()
    plain, labels, _ = model.columns.split(model._embed_pruned(inputs, images, sink))
    whole = model._embed_whole(inputs)
    for shape, embedding, every, selection in zip(
        images, plain, whole, sink.of_images, strict=True
    ):
        assert len(every) == shape.counts.encoder == count_tokens(shape.grids)
        places = torch.arange(len(every))
        if selection is not None:
            places = model.prompt_order(shape.grids, every.device)[selection.patches]
        assert places.tolist() == sorted({*places.tolist()})
        assert len(places) == shape.counts.stages[0]
        torch.testing.assert_close(embedding, every[places])
    assert (labels is not None) == (selector == "vitcop")


@torch.inference_mode()
@pytest.mark.parametrize("ps_version", ["v1", "v2"])
def test_a_token_is_made_of_the_patches_at_its_place(ps_version):
    """Each patch holds its row and column in the image, so a token must hold its own four."""
    model = Model(ps_version=ps_version)
    for grids in GRIDS:
        patches, order = model._find_tokens(grids)
        place_of_patch = []
        for grid in grids:
            for top in range(0, 2 * grid.rows, SIDE):
                for left in range(0, 2 * grid.columns, SIDE):
                    row, column = torch.meshgrid(
                        torch.arange(SIDE) + top, torch.arange(SIDE) + left, indexing="ij"
                    )
                    place_of_patch.append(torch.stack((row, column), dim=-1).flatten(0, 1))
        places = torch.cat(place_of_patch)[patches]  # (V, 4, 2)
        expected = torch.cat(
            [
                torch.tensor([(row, column) for row in range(rows) for column in range(columns)])
                for rows, columns, _ in grids
            ]
        )
        assert torch.equal(places.amin(dim=1), 2 * expected)
        assert torch.equal(places.amax(dim=1), 2 * expected + 1)
        assert sorted(order.tolist()) == [*range(len(patches))]


@torch.inference_mode()
@pytest.mark.parametrize("signal", [None, "received"])
def test_saliency_is_the_average_over_a_token_s_patches(signal):
    torch.manual_seed(0)
    model, inputs = Model(), inputs_on(torch.device("cpu"))
    this: Any = model
    settings = model.pruning.model_copy(update={"encoder_signal": signal})
    object.__setattr__(this.stage_one, "settings", settings)
    counts = VisualTokenCounts(count_tokens(GRIDS[0]), 4, (20, 10, 3))
    sink: Any = Selections()
    model._embed_pruned(model.slice_images(inputs, 0, 1), [ImageShape(counts, GRIDS[0])], sink)
    (selection,) = sink.of_images
    assert selection.saliency.sum() > 0

    attention = model.layer.self_attn
    pixels = inputs["pixel_values_flat"][: TILES[0]]
    patches = nn.functional.unfold(pixels, 14, stride=14).mT
    hidden = this.embed(nn.functional.pad(patches, (0, 0, 1, 0)))
    query, key, _ = (
        part.unflatten(-1, (HEADS, -1)) for part in attention.qkv_proj(hidden)[0].chunk(3, dim=-1)
    )
    scores = torch.einsum("tqhd,tkhd->thqk", query, key) * attention.scale
    weights = scores.softmax(-1)
    attended = weights[:, :, 0] if signal is None else weights.mean(2)
    by_patch = attended.sum(1)[:, 1:].flatten()
    expected = by_patch[model._find_tokens(GRIDS[0]).patches].mean(1)
    torch.testing.assert_close(selection.saliency, expected)
    best = expected.argsort(descending=True, stable=True)[:20]
    assert {*selection.patches.tolist()} == {*best.tolist()}


class ScaledKeys(Attention):
    """Scales keys, in the place of a norm."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(hidden)[0].chunk(3, dim=-1)
        output: torch.Tensor = self.out_proj(self.attn(query, 3 * key, value))[0]
        return output


@torch.inference_mode()
def test_features_are_averages_of_keys_before_any_norm():
    torch.manual_seed(0)
    model, inputs = Model(), inputs_on(torch.device("cpu"))
    model.layer.self_attn.__class__ = ScaledKeys
    shape = images_of(GRIDS[:1], 1, "vitcop")[0]
    views: list[EncoderView] = []

    def keep(view_of: Any) -> Any:
        views.append(view_of(shape, [0]))
        return model.stage_one.keep({shape: [0]}, view_of)

    model.encode_kept(model.slice_images(inputs, 0, 1), {shape: [0]}, keep)
    (view,) = views
    keys = (view.keys[:, 1:].flatten(2) / 3).flatten(0, 1)
    torch.testing.assert_close(
        view.features()[0], keys[model._find_tokens(GRIDS[0]).patches].mean(dim=1)
    )


@torch.inference_mode()
def test_an_image_that_stage_one_leaves_whole_is_recorded_in_the_order_of_the_prompt():
    model, inputs = Model("key_norm"), inputs_on(torch.device("cpu"))
    this: Any = model
    this._encoder_ran, this.sink = True, Selections()
    num_tokens = count_tokens(GRIDS[0])
    shape = ImageShape(VisualTokenCounts(num_tokens, 0, (num_tokens, 10, 3)), GRIDS[0])
    one = model.slice_images(inputs, 0, 1)
    model.embed_multimodal(**one, **{COUNTS_FIELD: torch.tensor([shape_row(shape)])})
    (selection,) = this.sink.of_images
    order = model.prompt_order(GRIDS[0], torch.device("cpu"))
    assert order[selection.patches].tolist() == [*range(num_tokens)]


def test_slices_have_the_tiles_of_their_images():
    model, inputs = Model(), inputs_on(torch.device("cpu"))
    part = model.slice_images(inputs, 1, 3)
    assert torch.equal(part["pixel_values_flat"], inputs["pixel_values_flat"][7:15])
    assert part["image_num_patches"].tolist() == [4, 4]


@no_host_sync()
@torch.inference_mode()
@pytest.mark.parametrize("selector", ENCODER_SELECTORS)
def test_encoding_does_not_make_the_host_wait_for_the_gpu(selector):
    with torch.device(CUDA):
        model = Model(selector)
    images = images_of(GRIDS, 1, selector)
    embeddings = model._embed_pruned(inputs_on(CUDA), images)
    for (counts, *_), embedding in zip(images, embeddings, strict=True):
        assert embedding.shape == (counts.stages[0], HIDDEN + bool(counts.centres))
