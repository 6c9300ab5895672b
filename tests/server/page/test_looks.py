"""Forced colours, large text and small screens."""

from itertools import combinations

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.server.page.person import ask, opened

pytestmark = pytest.mark.slow

STYLE = """(element) => {
  const { color, backgroundColor, backgroundImage, boxShadow } = getComputedStyle(element);
  return [color, backgroundColor, backgroundImage, boxShadow];
}"""


def styles(elements: Locator) -> list[tuple[str, ...]]:
    return [tuple(element.evaluate(STYLE)) for element in elements.all()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colours_keep_meaningful_colours(browser: Browser, url: str, scheme: str) -> None:
    with opened(browser, url, forced_colors="active", color_scheme=scheme) as page:
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        assert "gradient" in styles(page.locator("#legend .l-heat"))[0][2]
        page.locator("#frame").press("ArrowRight")
        page.locator("#frame").press("ArrowRight")
        assert len(set(styles(page.locator("#legend i")))) == 4
        for chosen, others in (
            ("#stops .chosen", "#stops li:not(.chosen)"),
            ("#samples [aria-pressed=true]", "#samples [aria-pressed=false]"),
        ):
            (style,) = styles(page.locator(chosen))
            assert style not in styles(page.locator(others))
        ink = page.evaluate("getComputedStyle(document.body).color")
        fills = page.locator("#chart text:not(.count)").evaluate_all(
            "(labels) => labels.map((label) => getComputedStyle(label).fill)"
        )
        assert set(fills) == {ink}


def overlaps(labels: list[dict[str, float]]) -> list[tuple[int, int]]:
    return [
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(labels), 2)
        if a["left"] < b["right"]
        and b["left"] < a["right"]
        and a["top"] < b["bottom"]
        and b["top"] < a["bottom"]
    ]


BOXES = "(all) => all.map((element) => element.getBoundingClientRect().toJSON())"


@pytest.mark.parametrize("text_size", [100, 200])
@pytest.mark.parametrize("width", [320, 375, 640, 1280])
def test_nothing_overlaps_or_overflows(
    browser: Browser, url: str, width: int, text_size: int
) -> None:
    with opened(browser, url, viewport={"width": width, "height": 800}) as page:
        page.evaluate(f"document.documentElement.style.fontSize = '{text_size}%'")
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        for ratio, num_counts in (("0.1", 1), ("0.889", 2)):
            with page.expect_response("**/v1/pruning/plan**"):
                page.get_by_role("spinbutton", name="Ratio").fill(ratio)
            expect(page.locator("#plan-text")).to_contain_text(f"{float(ratio):.0%}"[:-1])
            check_chart(page)
            assert page.locator("#chart .count").count() >= num_counts
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for pieces in ("#stops b", "#answers h3, #answers .answer, #answers dt, #answers dd"):
            assert overlaps(page.locator(pieces).evaluate_all(BOXES)) == []


def check_chart(page: Page) -> None:
    labels = page.locator("#chart text").evaluate_all(BOXES)
    assert overlaps(labels) == []
    chart = page.locator("#chart").evaluate("(chart) => chart.getBoundingClientRect().toJSON()")
    assert min(label["left"] for label in labels) >= chart["left"]
    assert max(label["right"] for label in labels) <= chart["right"]
    texts = page.locator("#chart text").all_text_contents()
    assert "576" in texts
    assert "layer 15" in texts
