"""Several images of the user's, compared at several ratios."""

import base64
import re

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from tests.server.clients import CHAT
from tests.server.page.person import opened
from tests.server.page.test_files import FOLDER
from vitcop_vllm.pruning.settings import RATIO_HEADER

pytestmark = pytest.mark.slow

QUESTION = "What does the sign say?"

NAMES = ["plum.png", "snow.png"]

DROP = """([target, count]) => {
  const data = new DataTransfer();
  const gif = (i) => new File(["GIF"], `${i}.gif`, { type: "image/gif" });
  for (let i = 0; i < count; i++) data.items.add(gif(i));
  const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data });
  document.querySelector(target).dispatchEvent(drop);
}"""


def choose_files(page: Page) -> None:
    page.get_by_label("Choose images…").set_input_files([FOLDER / name for name in NAMES])
    expect(page.locator("#compare-status")).to_have_text("2 images chosen.")


def answer(url: str, name: str, ratio: str) -> str:
    image = base64.b64encode((FOLDER / name).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], "temperature": 0}
    given = httpx.post(url + CHAT, json=body, headers={RATIO_HEADER: ratio}, timeout=120)
    return str(given.json()["choices"][0]["message"]["content"]).strip()


def test_answers_are_compared_with_those_at_ratio_0(browser: Browser, url: str) -> None:
    with opened(browser, url, viewport={"width": 320, "height": 800}) as page:
        expect(page.locator("#stops li")).to_have_count(4)
        choose_files(page)
        page.get_by_role("textbox", name="Question").fill(QUESTION)
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#compare-note")).to_contain_text(
            "2 images can only show that at least 22.3\u00a0% of such images keep theirs"
        )
        rows = page.locator("#agreement tbody tr").all()
        unpruned = [answer(url, name, "0") for name in NAMES]
        for row, ratio in zip(rows, ["0.5", "0.667", "0.778", "0.889", "0.95"], strict=True):
            pruned = [answer(url, name, ratio) for name in NAMES]
            changed = [
                f"{name}: “{old}”, now “{new}”"
                for name, old, new in zip(NAMES, unpruned, pruned, strict=True)
                if old != new
            ]
            shown, same, _ = row.locator("td").all_text_contents()
            assert (shown, same) == (ratio, f"{2 - len(changed)} of 2")
            assert row.locator("li").all_text_contents() == changed
        assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_a_changed_answer_is_shown(page: Page) -> None:
    def change(route: Route) -> None:
        ratio = route.request.headers["x-pruning-ratio"]
        text = " many" if float(ratio) == 0.95 else " two"
        route.fulfill(json={"choices": [{"message": {"content": text}}]})

    page.route("**/v1/chat/completions", change)
    choose_files(page)
    page.get_by_role("button", name="Compare").click()
    last = page.locator("#agreement tbody tr").last
    expect(last).to_contain_text("0 of 2")
    expect(last.locator("li")).to_have_text([f"{name}: “two”, now “many”" for name in NAMES])


def test_files_dropped_on_the_section_are_all_taken(page: Page) -> None:
    before = page.locator("#image").get_attribute("src")
    page.evaluate(DROP, ["#several", 3])
    expect(page.locator("#compare-status")).to_have_text("3 images chosen.")
    assert page.locator("#image").get_attribute("src") == before
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#several #alert")).to_contain_text(re.compile("The server answered 400"))
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_nothing_chosen_and_stopped(page: Page) -> None:
    compare = page.get_by_role("button", name="Compare")
    compare.click()
    expect(page.locator("#several #alert")).to_have_text("Choose images first.")
    choose_files(page)
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    sent: list[Request] = []
    page.on("request", lambda one: sent.append(one) if "completions" in one.url else None)
    compare.dblclick()
    expect(page.locator("#compare-status")).to_have_text("Asking at ratio 0: image 1 of 2…")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#compare-status")).to_have_text("Stopped.")
    expect(page.locator("#several #alert")).to_be_hidden()
    assert len(sent) == 1
