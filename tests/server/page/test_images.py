"""Files that browsers decode differently from the server, or not at all."""

from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.server.page.person import answers, ask, drawn, encoded, hold, png, upload

pytestmark = pytest.mark.slow

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (600, 336)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def turned_webp() -> bytes:
    """Stored rotated, with an EXIF orientation that Chromium ignores."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = halves().transpose(Image.Transpose.ROTATE_90)
    return encoded(stored, "WEBP", exif=exif, lossless=True)


def animation(kind: str, **options: Any) -> bytes:
    rest = [Image.new("RGB", (600, 336), "lime"), Image.new("RGB", (600, 336), "black")]
    every = {"save_all": True, "append_images": rest, "duration": 20, "loop": 0}
    return encoded(halves(), kind, **every, **options)


def clear_png() -> bytes:
    """Blue, with a transparent left half."""
    image = Image.new("RGBA", (600, 336), (*BLUE, 255))
    image.paste((0, 255, 0, 0), (0, 0, 300, 336))
    return encoded(image)


def pixels(page: Page) -> list[tuple[int, ...]]:
    """Colours of the page's image, in the middle of its left and right half."""
    script = """(image) => {
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      return [0.25, 0.75].map((x) =>
        [...context.getImageData(x * canvas.width, canvas.height / 2, 1, 1).data.slice(0, 3)]);
    }"""
    return [tuple(colour) for colour in page.locator("#image").evaluate(script)]


@pytest.mark.parametrize(
    ("kind", "content", "left"),
    [
        ("webp", turned_webp(), RED),
        ("png", animation("PNG"), RED),
        ("png", animation("PNG", default_image=True), RED),
        ("gif", animation("GIF"), RED),
        ("webp", animation("WEBP", lossless=True), RED),
        ("tiff", encoded(halves(), "TIFF"), RED),
        ("tiff", encoded(halves("CMYK"), "TIFF"), RED),
        ("png", clear_png(), WHITE),
    ],
    ids=["turned", "apng", "apng-default", "gif", "webp", "tiff", "cmyk", "clear"],
)
def test_the_page_shows_the_frame_that_the_model_gets(
    page: Page, kind: str, content: bytes, left: tuple[int, ...]
) -> None:
    upload(page, f"mine.{kind}", f"image/{kind}", content)
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 600 336")
    page.wait_for_timeout(200)  # an animation would change
    for colour, expected in zip(pixels(page), (left, BLUE), strict=True):
        assert colour == pytest.approx(expected, abs=8)
    # The cropped-off area is marked even without a question.
    expect(page.locator("#cells .outside")).to_have_attribute(
        "d", "M0 0H600V336H0ZM132 0V336H468V0Z"
    )


def test_cells_follow_a_rotated_image(page: Page) -> None:
    upload(page, "mine.webp", "image/webp", turned_webp())
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 600 336")
    page.get_by_role("textbox", name="Question").fill("What does the sign say?")
    ask(page)
    boxes = drawn(page, ".heat")
    assert len(boxes) == 576
    edges = [f(box[i] for box in boxes) for i, f in enumerate((min, min, max, max))]
    assert edges == pytest.approx([132 / 600, 0, 468 / 600, 1], abs=0.005)


def test_a_large_image_is_shown_small_with_its_size(page: Page) -> None:
    upload(page, "mine.png", "image/png", encoded(halves(size=(3000, 1500))))
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 3000 1500")
    size = page.locator("#image").evaluate("(img) => [img.naturalWidth, img.naturalHeight]")
    assert size == [1024, 512]
    box = page.locator("#image").bounding_box()
    assert box is not None
    assert box["width"] == pytest.approx(2 * box["height"], rel=0.01)


def test_the_last_chosen_image_is_shown(page: Page) -> None:
    held = hold(page, "**/v1/pruning/image")
    with page.expect_request("**/v1/pruning/image"):
        upload(page, "slow.png", "image/png", png(300, 100))
    expect(page.locator("#frame")).to_have_attribute("aria-busy", "true")
    upload(page, "fast.png", "image/png", png(200, 100))
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 200 100")
    with page.expect_response("**/v1/pruning/image"):
        held[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 200 100")
    expect(page.locator("#alert")).to_be_hidden()


def test_a_question_waits_for_the_chosen_image(page: Page) -> None:
    held = hold(page, "**/v1/pruning/image")
    with page.expect_request("**/v1/pruning/image"):
        page.locator("#samples [value='snow.png']").click()
    page.get_by_role("button", name="Ask", exact=True).dblclick()
    held[0].continue_()
    expect(page.locator("#summary")).not_to_be_empty()
    assert answers(page) == ["SNOW", "SNOW"]


def test_a_refused_image_cancels_the_question(page: Page) -> None:
    held = hold(page, "**/v1/pruning/image")
    with page.expect_request("**/v1/pruning/image"):
        upload(page, "mine.png", "image/png", b"no image")
    page.get_by_role("button", name="Ask", exact=True).click()
    held[0].continue_()
    expect(page.locator("#image-section").get_by_role("alert")).to_contain_text("400")
    expect(page.locator("#status")).to_be_empty()
