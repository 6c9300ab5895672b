"""What a person does on the page, and sees there."""

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
"""What is right to answer to each question that the page offers."""


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, in a browser that has never seen it; nothing in its console is left unread."""
    context = browser.new_context(**options)
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda line: troubles.append(line.text))
    page.on("pageerror", lambda error: troubles.append(error.message))
    try:
        page.goto(f"{url}/ui")
        yield page
    finally:
        context.close()
    # A refused request is a line of its own there; violated policies and bugs are others.
    assert [line for line in troubles if not line.startswith("Failed to load resource")] == []


def hold(page: Page, address: str) -> list[Route]:
    """The next request to ``address``, once it is sent: nobody answers it until the test does."""
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
    """Those in ``text``, in which 1,024 is one."""
    return [int(number) for number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))]


def drawn(page: Page, what: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of what is drawn, as shares of the image.

    A path of closed squares is as many things; any other path is one.
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
