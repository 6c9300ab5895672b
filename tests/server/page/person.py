"""A user's actions on the page, and its visible content."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

SAMPLES = {
    "plum.png": ["PLUM", "top left", "purple"],
    "snow.png": ["SNOW", "5", "heart"],
    "bank.png": [
        "small red square, small green square, big red cross, small purple square, sign BANK",
        "2",
        "top right",
    ],
    "duck.png": ["DUCK", "square", "middle left"],
}
"""Right answers to the page's sample questions."""

VIDEO_SAMPLE = "shapes.webm"


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page in a new browser context; checks that its console has no errors."""
    context = browser.new_context(**options)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda line: errors.append(line.text))
    page.on("pageerror", lambda error: errors.append(error.message))
    try:
        page.goto(f"{url}/ui")
        yield page
    finally:
        context.close()
    # Tests may provoke refused requests; policy violations and bugs are errors.
    assert [line for line in errors if not line.startswith("Failed to load resource")] == []


def hold(page: Page, address: str) -> list[Route]:
    """Hold the next request to ``address``; the test continues it."""
    held: list[Route] = []
    page.route(address, lambda route: held.append(route), times=1)
    return held


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#summary")).not_to_be_empty()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def choose(page: Page, sample: str) -> None:
    page.locator(f"#samples [value='{sample}']").click()
    expect(page.locator(f"#samples [value='{sample}']")).to_have_attribute("aria-pressed", "true")


def upload(page: Page, name: str, kind: str, content: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    return encoded(Image.new("1", (width, height)))


def answers(page: Page) -> list[str]:
    return page.locator("#answers .answer").all_inner_texts()


def facts(page: Page, pane: int) -> dict[str, str]:
    names = page.locator("#answers dl").nth(pane).locator("dt").all_inner_texts()
    values = page.locator("#answers dl").nth(pane).locator("dd").all_inner_texts()
    return dict(zip(names, values, strict=True))


def numbers(text: str) -> list[int]:
    """The numbers in ``text``; commas separate thousands."""
    return [int(number) for number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))]


def drawn(page: Page, what: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of drawn items, as shares of the image.

    A path of closed squares is an item per square; any other path is one item.
    """
    script = """(cells, what) => {
      const { width, height } = cells.viewBox.baseVal;
      const share = ({ x, y }) => [x / width, y / height];
      return [...cells.querySelectorAll(what)].flatMap((path) => {
        const laid = path.parentNode.transform.baseVal.consolidate().matrix;
        const corners = (left, top, right, bottom) => [[left, top], [right, bottom]].flatMap(
          ([x, y]) => share(new DOMPoint(x, y).matrixTransform(DOMMatrix.fromMatrix(laid))));
        const d = path.getAttribute("d");
        if (d && !d.includes("z")) {
          const box = path.getBBox();
          return [corners(box.x, box.y, box.x + box.width, box.y + box.height)];
        }
        const squares = d.matchAll(/M([^ ]+) ([^h]+)h([^v]+)v([^h]+)h-([^z]+)z/g);
        return [...squares].map(([, x, y, size]) => corners(+x, +y, +x + +size, +y + +size));
      });
    }"""
    boxes = [tuple(box) for box in page.locator("#cells").evaluate(script, what)]
    assert all(box[0] < box[2] and box[1] < box[3] for box in boxes)
    return boxes
