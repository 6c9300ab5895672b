"""Text is found on plain grounds and on photographs; objects and noise are not."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.pruning.photographs import PHOTOS, photo, write
from vitcop_vllm.pruning.detail import dense_share, dense_share_of_frames
from vitcop_vllm.pruning.grids import Grid

GRID = Grid(24, 24)


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_has_more_dense_patches_with_text_on_it(name: str) -> None:
    image = photo(name)
    plain = dense_share(image, GRID)
    assert plain < 0.01
    assert dense_share(write(image, 4), GRID) > plain + 0.02


def test_more_text_is_more_detail() -> None:
    page = Image.new("RGB", (672, 672), "white")
    shares = [dense_share(write(page, lines), GRID) for lines in (0, 1, 4, 12)]
    assert shares[0] == 0
    assert shares == sorted(set(shares))


def test_large_objects_and_noise_are_no_detail() -> None:
    image = Image.new("RGB", (336, 336), "white")
    ImageDraw.Draw(image).ellipse((50, 50, 290, 290), fill="black")
    assert dense_share(image, GRID) == 0
    noise = np.random.default_rng(0).integers(100, 160, (336, 336, 3), dtype=np.uint8)
    assert dense_share(Image.fromarray(noise), GRID) == 0


def test_all_forms_of_an_image_have_the_same_share() -> None:
    image = write(photo("cat"), 4)
    pixels = np.asarray(image)
    share = dense_share(image, GRID)
    first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    forms: list[Any] = [
        image.convert("RGBA"), pixels, first, first / 255, torch.from_numpy(first),
        torch.from_numpy(first).float(),
    ]  # fmt: skip
    assert [dense_share(form, GRID) for form in forms] == [share] * len(forms)
    gray = image.convert("L")
    assert dense_share(np.asarray(gray)[..., None], GRID) == dense_share(gray, GRID)


def test_a_grid_need_not_be_square() -> None:
    page = write(Image.new("RGB", (672, 336), "white"), 4)
    assert dense_share(page, Grid(12, 24)) > dense_share(page, Grid(24, 12)) > 0


def test_a_video_has_the_share_of_its_most_detailed_frame() -> None:
    page = write(Image.new("RGB", (336, 336), "white"), 4)
    blank = Image.new("RGB", (336, 336), "white")
    frames = [np.asarray(one) for one in (blank, page, blank)]
    assert dense_share_of_frames(frames, GRID) == dense_share(page, GRID)
    assert dense_share_of_frames([blank] * 100, GRID) == 0
