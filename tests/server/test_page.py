"""The page at ``/ui`` as a person sees it: a real browser, the real server, the demo model."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Request, Route, expect, sync_playwright

from server.page import attach_page
from server.settings import ServerSettings

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "server" / "samples"

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

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

SCRIPT = "<img src=x onerror=alert(1)><b>bold</b>"

Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    path = shutil.which("chromium") or shutil.which("google-chrome")  # else Playwright's own
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Error as error:
            reason = f"no Chromium to drive: {error.message.splitlines()[0]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(browser: Browser, request: pytest.FixtureRequest) -> str:
    """Of the demo model's server, which is not started where there is no browser."""
    demo_url: str = request.getfixturevalue("demo_url")
    return demo_url


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


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """Opened, with its first sample picture."""
    with opened(browser, url) as page:
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        expect(page.locator("#stops li")).to_have_count(4)
        yield page


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#summary")).not_to_be_empty()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


def choose(page: Page, sample: str) -> None:
    page.locator(f"#samples [value='{sample}']").click()
    expect(page.locator(f"#samples [value='{sample}']")).to_have_attribute("aria-pressed", "true")


def upload(page: Page, name: str, kind: str, content: bytes) -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


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
    """Left, top, right, bottom of what is drawn, as shares of the picture."""
    script = """(cells, what) => {
      const frame = cells.getBoundingClientRect();
      return [...cells.querySelectorAll(what)].map((cell) => {
        const { left, top, right, bottom } = cell.getBoundingClientRect();
        return [(left - frame.left) / frame.width, (top - frame.top) / frame.height,
                (right - frame.left) / frame.width, (bottom - frame.top) / frame.height];
      });
    }"""
    boxes = [tuple(box) for box in page.locator("#cells").evaluate(script, what)]
    assert all(box[0] < box[2] and box[1] < box[3] for box in boxes)
    return boxes


def test_two_answers_with_their_times_and_counts(page):
    ask(page)
    assert answers(page) == ["PLUM", "PLUM"]
    full, pruned = facts(page, 0), facts(page, 1)
    for told in (full, pruned):
        assert 0 < numbers(told["First token"])[0] <= numbers(told["Last token"])[0]
    assert (full["Tokens kept"], pruned["Tokens kept"]) == ("all 576", "172, 77, 15 of 576")
    expect(page.locator("#summary")).to_contain_text("The same answer with 89\u00a0%")


def test_questions_are_asked_in_turn_and_share_nothing(page):
    order: list[str] = []
    bodies: list[Any] = []

    def note(event: str) -> Callable[[Request], None]:
        def listen(request: Request) -> None:
            if request.url.endswith("/v1/chat/completions"):
                order.append(f"{event} {request.headers['x-pruning-ratio']}")
                bodies.extend([request.post_data_json] * (event == "sent"))

        return listen

    page.on("request", note("sent"))
    page.on("requestfinished", note("done"))
    ask(page)
    assert order == ["sent 0", "done 0", "sent 0.889", "done 0.889"]
    first, second = bodies
    assert first["cache_salt"] != second["cache_salt"]
    # Not even the encoder's output: to the server's caches they are two pictures.
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert pictures[0][:1000] == pictures[1][:1000]
    assert pictures[0] != pictures[1]


def test_cells_drawn_are_the_tokens_that_usage_counts(page):
    ask(page)
    *counts, encoder = numbers(facts(page, 1)["Tokens kept"])
    assert len(drawn(page, ".heat")) == encoder
    slider = page.get_by_role("slider", name="Stage shown")
    slider.focus()
    for stage, count in zip(("Stage I", "Stage II", "Stage III"), counts, strict=True):
        slider.press("ArrowRight")
        expect(page.locator("#caption")).to_contain_text(f"{stage}, layer")
        expect(page.locator("#stops .chosen")).to_have_text(f"{count}{stage}")
        assert len(drawn(page, ".kept")) == count
        clusters, seats = drawn(page, ".cluster"), drawn(page, ".kept.seat")
        assert len(clusters) == len(seats)
        every = drawn(page, ".kept:not(.seat), .member, .dropped")
        assert len(every) == encoder  # each patch is one of these
        told = numbers(page.locator("#caption").inner_text().split(":", 1)[1])
        if clusters:
            assert told == [
                count,
                encoder,
                count - len(clusters),
                len(clusters),
                len(drawn(page, ".member")),
            ]
        else:
            assert told == [count, encoder]


def test_arrow_keys_on_picture_and_slider_change_the_stage(page):
    ask(page)
    seen = []
    page.locator("#frame").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(numbers(page.locator("#caption").inner_text().split(":", 1)[1])[0])
    page.get_by_role("slider", name="Stage shown").focus()
    for key in ("Home", "End"):
        page.keyboard.press(key)
        seen.append(numbers(page.locator("#caption").inner_text().split(":", 1)[1])[0])
    assert seen == [172, 77, 15, 15, 77, 576, 15]


def test_the_question_keeps_its_arrow_keys(page):
    page.get_by_role("textbox", name="Question").press("ArrowRight")
    expect(page.get_by_role("slider", name="Stage shown")).to_have_value("0")


def test_cells_lie_on_what_the_processor_shows(page):
    choose(page, "bank.png")  # 504 x 336; its middle square is shown to the model
    ask(page)
    page.locator("#frame").press("ArrowRight")
    boxes = drawn(page, ".kept, .dropped")
    edges = [f(box[i] for box in boxes) for i, f in enumerate((min, min, max, max))]
    assert edges == pytest.approx([84 / 504, 0, 420 / 504, 1], abs=0.005)


def test_every_offered_question_is_answered_right(page):
    right = []
    for sample, expected in SAMPLES.items():
        choose(page, sample)
        questions = page.locator("#suggestions button")
        expect(questions).to_have_count(len(expected))
        for i, answer in enumerate(expected):
            questions.nth(i).click()
            ask(page)
            full, pruned = answers(page)
            assert full == answer, (sample, i)
            right.append(pruned == answer)
    assert sum(right) >= len(right) - 2, right


def test_the_plan_follows_the_ratio(page):
    counts = page.locator("#stops b")
    expect(counts).to_have_text(["576", "172", "77", "15"])
    expect(page.locator("#chart .count")).to_have_text(["172", "77", "15"])
    page.get_by_role("button", name="0.667").click()
    expect(counts).to_have_text(["576", "288", "253", "51"])
    expect(page.locator("#chart .count")).to_have_text(["288", "253", "51"])
    expect(page.locator("#plan-text")).to_contain_text("66.7\u00a0% removed")
    page.get_by_role("spinbutton", name="Ratio").fill("0")
    expect(page.locator("#plan-text")).to_contain_text("Nothing is removed")
    expect(page.locator("#pruned-title")).to_have_text("Ratio 0")
    ask(page)
    assert facts(page, 1)["Tokens kept"] == "all 576"


def test_another_ratio_wipes_what_was_drawn_for_the_last(page):
    ask(page)
    assert drawn(page, ".heat")
    page.get_by_role("button", name="0.778").click()
    expect(page.locator("#caption")).to_contain_text("Ask, to see")
    assert not drawn(page, "rect")


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page, how):
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


def test_an_error_of_the_server_is_a_sentence(page):
    # The browser shows drawings; the server takes none.
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"><path d="M0 0h9v9"/></svg>'
    )
    upload(page, "drawing.svg", "image/svg+xml", svg)
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 90 60")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The server answered 400: ")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
    choose(page, "plum.png")
    expect(page.locator("#alert")).to_be_hidden()
    ask(page)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (png(2000, 100), "longest side is more than 16 times its shortest"),
        (png(6000, 5000), "30,000,000 pixels; the server takes 25,000,000 at most"),
        (b"no picture", "not a picture that the browser can show"),
    ],
    ids=["thin", "large", "text"],
)
def test_pictures_the_server_would_refuse_are_not_sent(page, content, sentence):
    upload(page, "mine.png", "image/png", content)
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)  # as it was


def test_a_running_question_can_be_stopped(page):
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, url, scheme):
    phone = {"width": 360, "height": 780}
    with opened(browser, url, viewport=phone, color_scheme=scheme) as page:
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        for _ in range(4):
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            page.locator("#frame").press("ArrowRight")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(numbers(colour)) < 3 * 128) == (scheme == "dark")


def test_everything_has_a_name(page):
    for role, name in [
        ("textbox", "Question"),
        ("spinbutton", "Ratio: the share of visual tokens removed, averaged over layers"),
        ("slider", "Ratio, as a slider"),
        ("slider", "Stage shown"),
        ("group", "Picture. The left and right arrow keys change the stage shown."),
        ("img", "Coloured shapes and a sign on a photograph of a coffee cup"),
        ("article", "Ratio 0"),
        ("article", "Ratio 0.889"),
    ]:
        expect(page.get_by_role(role, name=name, exact=True).first).to_be_visible()
    for button in page.locator("button:visible").all():
        assert button.inner_text() or button.locator("img[alt]").count()
    assert page.locator("#answers [aria-live=polite]").count() == 2


def test_without_explanations_counts_are_shown(browser, server_url):
    asked: list[str] = []
    with opened(browser, server_url) as page:
        page.on("request", lambda request: asked.append(request.url))
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        *counts, encoder = numbers(facts(page, 1)["Tokens kept"])
        assert encoder == 256
        for stage, count in enumerate(counts, 1):
            page.locator("#frame").press("ArrowRight")
            expect(page.locator("#caption")).to_contain_text(f"{count} of {encoder} tokens")
            expect(page.get_by_role("slider", name="Stage shown")).to_have_value(str(stage))
        expect(page.locator("#caption")).to_contain_text("--server.explain true")
        assert not drawn(page, "rect")
    assert not [address for address in asked if "explain" in address]


def test_a_key_is_asked_for_where_one_is_needed(browser, url):
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
        for wrong_or_right in ("wrong", "sesame"):
            key.fill(wrong_or_right)
            key.press("Enter")
        expect(key).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("demo")
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0


def test_page_and_samples_come_with_strict_headers(url):
    with httpx.Client(base_url=url) as client:
        for path, kind in (
            ("/ui", "text/html; charset=utf-8"),
            ("/ui/samples/plum.png", "image/png"),
        ):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_samples_are_small():
    samples = [*FOLDER.iterdir()]
    assert {sample.name for sample in samples} == set(SAMPLES)
    assert sum(sample.stat().st_size for sample in samples) < 200_000


@pytest.mark.parametrize(("page", "status"), [(True, 200), (False, 404)])
def test_an_operator_can_turn_the_page_off(page, status):
    app = FastAPI()
    app.state.pruning_server_settings = ServerSettings(page=page)
    attach_page(app)
    assert TestClient(app).get("/ui").status_code == status
