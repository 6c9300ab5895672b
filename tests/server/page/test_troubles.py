"""Pasted images, markup in text, errors, and API keys."""

import json

import pytest
from playwright.sync_api import Route, expect

from tests.server.page.person import answers, ask, choose, facts, opened, png, upload

pytestmark = pytest.mark.slow

SCRIPT = "<img src=x onerror=alert(1)><b>bold</b>"


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_images_are_pasted_and_dropped(page, how):
    script = """([how, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
      const options = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
      document.body.dispatchEvent(
        how === "paste" ? new ClipboardEvent("paste", options) : new DragEvent("drop", options));
    }"""
    page.evaluate(script, [how, list(png(200, 100))])
    expect(page.locator("#samples [aria-pressed=true]")).to_have_count(0)
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 200 100")
    ask(page)
    assert facts(page, 1)["Tokens kept"] == "172, 77, 15 of 576"


def test_markup_in_an_answer_is_text(page):
    chunk = json.dumps({"choices": [{"delta": {"content": SCRIPT}}]})

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    ask(page)
    assert answers(page) == [SCRIPT, SCRIPT]
    expect(page.locator(".answer *")).to_have_count(0)


@pytest.mark.parametrize("streamed", [False, True])
def test_markup_in_an_error_is_text(page, streamed):
    error = json.dumps({"error": {"message": SCRIPT, "type": "x", "param": None, "code": 400}})

    def answer(route: Route) -> None:
        if streamed:
            route.fulfill(content_type="text/event-stream", body=f"data: {error}\n\n")
        else:
            route.fulfill(status=400, content_type="application/json", body=error)

    page.route("**/v1/chat/completions", answer)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text(SCRIPT)
    expect(page.locator("#alert *")).to_have_count(0)


def test_a_server_error_shows_its_message(page):
    page.get_by_role("textbox", name="Question").fill("<image>")  # an image placeholder
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The server answered 400: ")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    choose(page, "plum.png")
    expect(page.locator("#alert")).to_be_hidden()
    ask(page)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(2000, 100), "server.max_aspect_ratio"),
        (png(6000, 5000), "server.max_image_pixels"),
        (b"no image", "400"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "400"),
    ],
    ids=["thin", "large", "text", "drawing"],
)
def test_a_refused_image_shows_its_error_below_the_image(page, content, message):
    upload(page, "mine.png", "image/png", content)
    expect(page.locator("#image-section").get_by_role("alert")).to_contain_text(message)
    expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)  # unchanged
    choose(page, "snow.png")
    expect(page.locator("#alert")).to_be_hidden()


def test_a_running_question_can_be_stopped(page):
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def test_the_page_asks_for_a_missing_api_key(browser, url):
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            body = '{"error": "Unauthorized"}'
            route.fulfill(status=401, content_type="application/json", body=body)

    with opened(browser, url) as page:
        page.route("**/v1/**", guard)
        page.goto(f"{url}/ui")
        key = page.get_by_label("API key")
        expect(key).to_be_visible()
        expect(key).to_have_attribute("type", "password")
        expect(key).to_be_focused()
        expect(page.locator("#alert")).to_be_hidden()  # no error yet
        alert = page.locator("#key-form").get_by_role("alert")
        for wrong, sentence in (
            ("wrong", "does not accept this key"),
            ("k\u20ac1", "cannot be sent"),  # fetch refuses such a header
            ("kl\u00fcger", "does not accept this key"),
        ):
            key.fill(wrong)
            key.press("Enter")
            expect(alert).to_contain_text(sentence)
            expect(key).to_be_focused()
        key.fill("sesame")
        key.press("Enter")
        expect(key).to_be_hidden()
        expect(page.locator("#alert")).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("demo")
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
