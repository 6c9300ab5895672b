"""Images of any aspect ratio and their grids, on the page of a model without weights."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.server.page.grid_server import grid_app, serving
from tests.server.page.person import ask, drawn, encoded, facts, numbers, opened, upload

pytestmark = pytest.mark.slow

GRIDS = {
    (1344, 140): (5, 48),
    (140, 1344): (48, 5),
    (600, 400): (15, 22),  # not a multiple of 28
    (1792, 1008): (36, 64),
}


@pytest.fixture(scope="module")
def grid_url(browser: Browser) -> Iterator[str]:
    with serving(grid_app()) as url:
        yield url


@contextmanager
def asked_page(browser: Browser, url: str, size: tuple[int, int], **options: Any) -> Iterator[Any]:
    """The page after a question about an image of ``size``, and the server's explanation."""
    with opened(browser, url, **options) as page:
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        width, height = size
        upload(page, "mine.jpg", "image/jpeg", encoded(Image.new("RGB", size, "teal"), "JPEG"))
        expect(page.locator("#cells")).to_have_attribute("viewBox", f"0 0 {width} {height}")
        page.get_by_role("textbox", name="Question").fill("What is it?")
        with page.expect_response("**/v1/pruning/explain") as explained:
            ask(page)
        (explanation,) = explained.value.json()["images"]
        yield page, explanation


def parts(page: Page, what: str, rows: int, columns: int) -> list[int]:
    """Indices of the grid cells on which ``what`` is drawn, row by row."""
    boxes = drawn(page, what)
    found = []
    for left, top, right, bottom in boxes:
        column, row = int((left + right) / 2 * columns), int((top + bottom) / 2 * rows)
        assert (left + right) / 2 == pytest.approx((column + 0.5) / columns, abs=1e-6)
        assert (top + bottom) / 2 == pytest.approx((row + 0.5) / rows, abs=1e-6)
        found.append(row * columns + column)
    assert len(set(found)) == len(found)
    return sorted(found)


def show(page: Page, step: int) -> None:
    page.get_by_role("slider", name="Stage shown").fill(str(step))


@pytest.mark.parametrize("size", GRIDS)
def test_cells_lie_on_a_grid_of_any_shape(
    browser: Browser, grid_url: str, size: tuple[int, int]
) -> None:
    rows, columns = GRIDS[size]
    with asked_page(browser, grid_url, size) as (page, explanation):
        assert parts(page, ".heat", rows, columns) == list(range(rows * columns))
        for step, stage in enumerate(explanation["stages"], 1):
            show(page, step)
            bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["kept"]), dtype=np.uint8))
            assert parts(page, ".kept", rows, columns) == np.flatnonzero(bits).tolist()
            members = sorted(part for group in stage["merged"] for part in group)
            assert parts(page, ".member", rows, columns) == members
            assert len(drawn(page, ".cluster")) == len(stage["merged"])
            every = parts(page, ".kept:not(.anchor), .member, .dropped", rows, columns)
            assert every == list(range(rows * columns))


@pytest.mark.parametrize("coarse_last", [False, True])
def test_each_grid_of_a_tiled_image_can_be_shown(browser: Browser, coarse_last: bool) -> None:
    coarse, fine = (3, 3), (15, 22)
    marked = "15 rows and 22 columns with a mark after each row"
    texts = ["3 rows and 3 columns", marked][:: -1 if coarse_last else 1]
    with (
        serving(grid_app(tiled=True, coarse_last=coarse_last)) as url,
        asked_page(browser, url, (600, 400)) as (
            page,
            explanation,
        ),
    ):
        expect(page.locator("#caption")).to_contain_text(f"in {' and again in '.join(texts)}")
        choice = page.get_by_role("combobox", name="Grid shown")
        finest = 0 if coarse_last else 1
        expect(choice).to_have_value(str(finest))
        for number, (rows, columns) in ((finest, fine), (1 - finest, coarse)):
            choice.select_option(str(number))
            show(page, 0)
            assert parts(page, ".heat", rows, columns) == list(range(rows * columns))
            for step, stage in enumerate(explanation["stages"], 1):
                show(page, step)
                bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["kept"]), dtype=np.uint8))
                first = number * (15 * 23 if coarse_last else 9)
                own = bits[first:][:9]
                if number == finest:
                    own = bits[first:][: 15 * 23].reshape(15, 23)[:, :22].flatten()
                assert parts(page, ".kept", rows, columns) == np.flatnonzero(own).tolist()
                every = parts(page, ".kept:not(.anchor), .member, .dropped", rows, columns)
                assert every == list(range(rows * columns))
        show(page, 0)
        expect(choice).to_have_value(str(1 - finest))


def test_a_model_that_stage_one_alone_prunes_has_no_other_stage(browser: Browser) -> None:
    app = grid_app(selector="received")
    with serving(app) as url, asked_page(browser, url, (600, 400)) as (page, explanation):
        kept = explanation["stages"][0]["tokens"]
        expect(page.locator("#stops li")).to_have_text(["330Encoder", f"{kept}Stage I"])
        assert facts(page, 1)["Tokens kept"] == f"{kept} of 330"
        frame = page.locator("#frame")
        for _ in range(3):
            frame.press("ArrowRight")
        expect(page.locator("#caption")).to_contain_text(f"Stage I, layers 0 to 27: {kept} of 330")
        assert len(drawn(page, ".kept")) == kept
        expect(page.locator("#plan-text")).to_contain_text(f"{kept} in layers 0 to 27: ")
        expect(page.locator("#chart .count")).to_have_text([str(kept)])
        assert "Stage II" not in page.locator("body").inner_text()


def test_an_image_with_one_grid_offers_no_choice(browser: Browser, grid_url: str) -> None:
    with asked_page(browser, grid_url, (600, 400)) as (page, _):
        expect(page.get_by_role("combobox", name="Grid shown")).to_be_hidden()


def test_an_outline_does_not_cross_the_edges_of_the_image(browser: Browser, grid_url: str) -> None:
    """The last cell of a row and the first of the next have consecutive indices."""
    columns = 5
    with asked_page(browser, grid_url, (140, 84)) as (page, explanation):
        stage = explanation["stages"][1]
        stage["merged"] = [[4, 5]]
        body = {"images": [explanation]}
        page.route("**/v1/pruning/explain", lambda route: route.fulfill(json=body))
        ask(page)
        show(page, 2)
        outline = page.locator("#cells .cluster").get_attribute("d")
    assert outline is not None
    assert outline.count("M") == 8  # two separate squares
    assert set(outline.split("M")[1:]) >= {f"{columns} 0v1", "0 1v1", "4 0v1", "1 1v1"}


def test_the_caption_names_grid_and_saliency(browser: Browser, grid_url: str) -> None:
    with asked_page(browser, grid_url, (1344, 140)) as (page, _):
        caption = page.locator("#caption")
        expect(caption).to_contain_text("240 tokens, each for one part of the image")
        expect(caption).to_contain_text("in 5 rows and 48 columns")
        expect(caption).to_contain_text("how much attention each token gets from the whole image")
        expect(caption).not_to_contain_text("CLS")
    with serving(grid_app(has_cls=True)) as url, asked_page(browser, url, (1344, 140)) as (page, _):
        expect(page.locator("#caption")).to_contain_text("attention the encoder's [CLS] token pays")


def test_16384_tokens_are_drawn_with_few_elements(browser: Browser, grid_url: str) -> None:
    """One element per token would take seconds."""
    with asked_page(browser, grid_url, (3584, 3584)) as (page, explanation):
        assert facts(page, 0)["Tokens kept"] == "all 16,384"
        for step in range(4):
            show(page, step)
            expect(page.locator("#cells")).to_have_class("fine")
            groups = len(explanation["stages"][step - 1]["merged"]) if step else 0
            assert page.locator("#cells *").count() < 80 + groups
        kept_last = numbers(page.locator("#caption").inner_text().split(":", 1)[1])[0]
        assert len(drawn(page, ".kept")) == kept_last


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("size", GRIDS)
def test_an_image_of_any_shape_fits_its_frame(
    browser: Browser, grid_url: str, size: tuple[int, int], width: int
) -> None:
    viewport = {"width": width, "height": 800}
    with asked_page(browser, grid_url, size, viewport=viewport) as (page, _):
        image, frame = (page.locator(part).bounding_box() for part in ("#image", "#frame"))
        assert image is not None
        assert frame is not None
        assert image["width"] / image["height"] == pytest.approx(size[0] / size[1], rel=0.05)
        assert image["width"] <= frame["width"]
        assert image["height"] <= min(frame["height"], 34 * 16)
        assert max(image["width"], image["height"]) >= min(250, frame["width"] - 2)
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_cell_borders_are_drawn_only_with_enough_room(browser: Browser, grid_url: str) -> None:
    with asked_page(browser, grid_url, (1792, 1008)) as (page, _):
        page.set_viewport_size({"width": 1280, "height": 800})
        expect(page.locator("#cells")).not_to_have_class("fine")
        page.set_viewport_size({"width": 320, "height": 800})
        expect(page.locator("#cells")).to_have_class("fine")
