"""Tokens come from where their grid lies in the image. No engine runs.

A model's processor gets an image whose colours are places. The colours of a token's patches then
say which part of the image the token stands for. Patches become tokens by transformers' code, or
by averages over squares.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from transformers import LlavaNextModel, LlavaOnevisionModel

from tests.checkpoints.stage_one_checkpoints import GEMMA_IMAGE
from tests.families.family import INTERNVL, INTERNVL_CHAT, LLAVA_NEXT, LLAVA_ONEVISION, Saved
from tests.families.stage_one_family import GEMMA3
from vitcop_vllm.models.layout import ImageLayout

SIZES = [(560, 392), (500, 120), (110, 420), (301, 299), (100, 100)]
PATCH, SQUARE = 14, 2
MARK = torch.full((3,), torch.nan)

Tokens = Callable[[torch.Tensor, tuple[int, int], ImageLayout, Any], torch.Tensor]
"""Patches, an image's (width, height), its layout, the model's configuration -> its tokens."""


def image_of_places(size: tuple[int, int]) -> Image.Image:
    """Red grows to the right and green downwards; blue tells the image from padding."""
    width, height = size
    right, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    colours = np.stack((right, down, np.ones_like(right)), axis=2)
    return Image.fromarray((255 * colours).round().astype(np.uint8))


def places_of_patches(
    pixels_of: Callable[[Image.Image], torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """(tiles, 3, rows, columns) place to the right, place down, and share that is no padding."""
    dark, bright = (pixels_of(Image.new("RGB", size, colour)) for colour in ("black", "white"))
    scale = (bright - dark).amax(dim=(0, 2, 3), keepdim=True)  # padding is equal on both
    return avg_pool2d((pixels_of(image_of_places(size)) - dark) / scale, PATCH)


def llava_tokens(
    model: type, patches: torch.Tensor, size: tuple[int, int], config: Any, **options: str
) -> torch.Tensor:
    (tokens,), _ = model.pack_image_features(  # type: ignore[attr-defined]
        SimpleNamespace(config=config),
        [patches.flatten(2).transpose(1, 2)],
        torch.tensor([size[::-1]]),
        image_newline=MARK,
        **options,
    )
    return tokens


def next_tokens(
    patches: torch.Tensor, size: tuple[int, int], layout: ImageLayout, config: Any
) -> torch.Tensor:
    strategy = config.vision_feature_select_strategy
    return llava_tokens(
        LlavaNextModel, patches, size, config, vision_feature_select_strategy=strategy
    )


def onevision_tokens(
    patches: torch.Tensor, size: tuple[int, int], layout: ImageLayout, config: Any
) -> torch.Tensor:
    return llava_tokens(LlavaOnevisionModel, patches, size, config)


def square_tokens(
    patches: torch.Tensor, size: tuple[int, int], layout: ImageLayout, config: Any
) -> torch.Tensor:
    """InternVL's tiles and thumbnail, or Gemma's image: a token is the average of a square."""
    of_tiles = avg_pool2d(patches, SQUARE).permute(0, 2, 3, 1)
    side = of_tiles.shape[1]
    tokens = []
    for grid in layout.grids:
        rows, columns = grid.rows // side, grid.columns // side
        own, of_tiles = of_tiles[: rows * columns], of_tiles[rows * columns :]
        tokens.append(own.unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 3))
    assert not len(of_tiles)
    return torch.cat(tokens)


def planned_places(layout: ImageLayout, size: tuple[int, int]) -> torch.Tensor:
    """(V, 4) each token's place to the right and down, width and height; NaN for a row mark."""
    (width, height), (left, top, right, bottom) = size, layout.box
    places = []
    for grid in layout.grids:
        row, column = torch.meshgrid(
            torch.arange(grid.rows), torch.arange(grid.columns + grid.row_marks), indexing="ij"
        )
        wide, tall = (right - left) / grid.columns / width, (bottom - top) / grid.rows / height
        x, y = left / width + (column + 0.5) * wide, top / height + (row + 0.5) * tall
        place = torch.stack((x, y, torch.full_like(x, wide), torch.full_like(y, tall)), dim=2)
        place[:, grid.columns :] = torch.nan
        places.append(place.flatten(0, 1))
    return torch.cat(places)


class Case(NamedTuple):
    """A family, the text of an image in its prompts, its field of pixels, and its tokens."""

    family: Saved
    opening: str
    pixels: str
    tokens: Tokens


CASES = {
    LLAVA_NEXT: next_tokens,
    LLAVA_ONEVISION: onevision_tokens,
    INTERNVL_CHAT: square_tokens,
    INTERNVL: square_tokens,
}


@pytest.fixture(
    scope="module",
    params=[
        *(Case(family, family.opening, family.pixels, of) for family, of in CASES.items()),
        Case(GEMMA3, GEMMA_IMAGE, "pixel_values", square_tokens),
    ],
    ids=lambda case: case.family.name,
)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def processor(case: Case, processor_of: Any) -> Any:
    return processor_of(case.family, {})


@pytest.mark.parametrize("size", SIZES)
def test_a_token_is_made_of_the_part_of_the_image_where_its_grid_has_it(
    case: Case, processor: Any, size: tuple[int, int]
) -> None:
    def pixels_of(image: Image.Image) -> torch.Tensor:
        items = processor.info.parse_mm_data({"image": image})
        processed = processor(case.opening, mm_items=items, hf_processor_mm_kwargs={})
        (item,) = processed["mm_kwargs"]["image"]
        pixels: torch.Tensor = item[case.pixels].data
        return pixels.reshape(-1, *pixels.shape[-3:]).float()

    layout = processor.info.layout(*size)
    config = processor.info.get_hf_config()
    made = case.tokens(places_of_patches(pixels_of, size), size, layout, config)
    planned = planned_places(layout, size)
    assert len(made) == len(planned) == layout.num_tokens
    is_mark = planned.isnan().any(dim=1)
    assert torch.equal(made.isnan().any(dim=1), is_mark)
    made, planned = made[~is_mark], planned[~is_mark]
    # LLaVA cuts padding off in whole patches: half a patch may be left or lost on each side.
    assert (made[:, 2] >= 0.5 - 0.02).all()
    whole = made[:, 2] > 0.99
    away = (made[whole, :2] - planned[whole, :2]).abs() / planned[whole, 2:]
    assert whole.sum() > len(made) / 2
    assert away.max() < (0.52 if is_mark.any() else 0.05)
