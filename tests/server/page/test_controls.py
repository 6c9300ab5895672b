"""Clicks, keys, pastes and drags."""

from typing import Any

import pytest
from playwright.sync_api import Page, Request, expect

from tests.server.page.person import answers, choose

pytestmark = pytest.mark.slow

COPIED = "How many objects are there?"

COPY = """async (text) => {
  const image = await (await fetch("ui/samples/snow.png")).blob();
  const parts = { "image/png": image };
  if (text) parts["text/plain"] = new Blob([text], { type: "text/plain" });
  await navigator.clipboard.write([new ClipboardItem(parts)]);
}"""
"""Copies an image, and text beside it as spreadsheets do."""

DROP = """([target, text]) => {
  const data = new DataTransfer();
  data.items.add(new File(["GIF"], "cells.gif", { type: "image/gif" }));
  if (text) data.setData("text/plain", text);
  const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data });
  document.querySelector(target).dispatchEvent(drop);
  return drop.defaultPrevented;
}"""


def alt(page: Page) -> Any:
    return page.locator("#image").get_attribute("alt")


@pytest.mark.parametrize("how", ["double click", "held key"])
def test_two_clicks_ask_once(page: Page, how: str) -> None:
    sent: list[Request] = []
    page.on("request", lambda one: sent.append(one) if "completions" in one.url else None)
    button = page.get_by_role("button", name="Ask", exact=True)
    if how == "double click":
        button.dblclick()
    else:
        button.focus()
        for _ in range(5):  # A key that is held down repeats.
            page.keyboard.down("Enter")
        page.keyboard.up("Enter")
    expect(page.locator("#summary")).not_to_be_empty()
    expect(button).to_be_visible()
    assert answers(page) == ["PLUM", "PLUM"]
    assert len(sent) == 2


def test_stopping_by_key_moves_the_focus_to_ask(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("button", name="Ask", exact=True).press("Enter")
    expect(page.get_by_role("button", name="Asking")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_focused()


@pytest.mark.parametrize("modifier", ["Alt", "Control", "Meta", "Shift"])
@pytest.mark.parametrize("focus", ["body", "#frame"])
def test_arrow_keys_with_a_modifier_are_left_to_the_browser(
    page: Page, focus: str, modifier: str
) -> None:
    page.evaluate(
        """() => { window.kept = []; addEventListener("keydown", (event) => {
          if (event.key.startsWith("Arrow")) window.kept.push(event.defaultPrevented); }); }"""
    )
    if focus != "body":
        page.locator(focus).focus()
    for arrow in ("ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(f"{modifier}+{arrow}")
        expect(page.get_by_role("slider", name="Stage shown")).to_have_value("0")
    assert page.evaluate("window.kept") == [False] * 3


@pytest.mark.parametrize("modifier", ["Shift", "Alt"])
def test_enter_with_a_modifier_sends_no_question(page: Page, modifier: str) -> None:
    page.get_by_role("textbox", name="Question").press(f"{modifier}+Enter")
    expect(page.locator("#status")).to_be_empty()


def test_enter_that_ends_a_composed_word_sends_no_question(page: Page) -> None:
    """Safari marks this Enter only with the key's code."""
    page.locator("#question").dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    expect(page.locator("#status")).to_be_empty()


def test_copied_cells_are_pasted_as_text_into_a_text_field(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    before = alt(page)
    page.evaluate(COPY, COPIED)
    question = page.get_by_role("textbox", name="Question")
    question.fill("")
    question.press("Control+V")
    expect(question).to_have_value(COPIED)
    assert alt(page) == before
    page.locator("#frame").press("Control+V")  # no text field
    expect(page.locator("#image")).to_have_attribute("alt", "Pasted image")


def test_a_copied_image_is_pasted_even_in_a_text_field(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, "")
    page.get_by_role("textbox", name="Question").press("Control+V")
    expect(page.locator("#image")).to_have_attribute("alt", "Pasted image")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What does the sign say?")


def test_text_can_be_dragged_into_the_question(page: Page) -> None:
    question = page.get_by_role("textbox", name="Question")
    question.fill("")
    before = alt(page)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#caption'))")
    page.locator("#caption").drag_to(question, source_position={"x": 20, "y": 8})
    expect(question).to_have_value(page.locator("#caption").inner_text())
    assert alt(page) == before


@pytest.mark.parametrize(
    ("target", "text", "is_taken"),
    [
        ("#question", "", True),
        ("#question", "cells", False),
        ("#ratio", "0.5", False),
        ("#frame", "cells", True),
        ("#ratio-range", "cells", True),
    ],
)
def test_a_text_field_takes_the_text_of_a_dropped_file(
    page: Page, target: str, text: str, is_taken: bool
) -> None:
    assert page.evaluate(DROP, [target, text]) == is_taken


def test_a_bad_ratio_is_not_applied(page: Page) -> None:
    ratio = page.get_by_role("spinbutton", name="Ratio")
    for wrong in ("", "1.5", "-1"):
        ratio.fill(wrong)
        choose(page, "snow.png")
        choose(page, "plum.png")
        expect(page.locator("#plan h2")).to_contain_text("at ratio 0.889")
        expect(page.locator("#pruned-title")).to_have_text("Ratio 0.889")
        expect(page.locator("#stops b")).to_have_text(["576", "172", "77", "15"])
        page.get_by_role("button", name="Ask", exact=True).click()  # the browser shows its hint
        expect(ratio).to_be_focused()
        expect(page.locator("#status")).to_be_empty()
    ratio.fill("0.5")
    expect(page.locator("#plan h2")).to_contain_text("at ratio 0.5")
