"""Videos and their frames, on the page of a model that takes them and on one that does not."""

import base64
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from demo.moving import FPS
from tests.families.family import QWEN2_5_VL, Family
from tests.server.page.grid_server import grid_app, serving
from tests.server.page.person import (
    VIDEO_SAMPLE,
    ask,
    choose,
    drawn,
    facts,
    numbers,
    opened,
    upload,
)
from tests.server.page.video_server import video_app
from tests.server.process import TINY_OPTIONS, running_server
from tests.server.sample_videos import video_file
from vitcop_server.settings import ServerSettings

pytestmark = pytest.mark.slow

FRAMES = 6
"""The sample has 6 seconds, of each of which the loader reads two frames; the encoder joins two."""

TOKENS = 144
"""Tokens of each of its frames, in 12 rows and columns."""

SAMPLE_NAME = "A video of coloured shapes that come in and move"

PATHS = "(paths) => paths.map((path) => [path.getAttribute('class'), path.getAttribute('d')])"


@pytest.fixture(scope="module")
def video_url(browser: Browser) -> Iterator[str]:
    with serving(video_app()) as url:
        yield url


@contextmanager
def video_page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page with the sample video."""
    with opened(browser, url, **options) as page:
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        choose(page, VIDEO_SAMPLE)
        yield page


@pytest.fixture
def page(browser: Browser, video_url: str) -> Iterator[Page]:
    with video_page(browser, video_url) as page:
        yield page


def ask_about_video(page: Page) -> list[dict[str, Any]]:
    """Ask a question; the explanations of the frames."""
    with page.expect_response("**/v1/pruning/explain") as explained:
        ask(page)
    (video,) = explained.value.json()["videos"]
    frames: list[dict[str, Any]] = video["frames"]
    return frames


def strip(page: Page) -> Locator:
    return page.locator("#strip button")


def current(page: Page) -> int:
    """Number of the frame shown, from 1; page and strip agree on it."""
    name = page.locator("#strip [aria-current=true]").get_attribute("aria-label")
    assert name is not None
    expect(page.locator("#caption")).to_have_text(re.compile(rf"^{name.split(',')[0]}[.,]"))
    return numbers(name)[0]


def video_is(page: Page, name: str) -> Any:
    return page.locator("#video").evaluate("(video, name) => video[name]", name)


def show(page: Page, step: int) -> None:
    page.get_by_role("slider", name="Stage shown").fill(str(step))


def kept_on(thumbnail: Locator) -> int:
    """Number of kept parts that a frame of the strip shows; merged tokens are drawn smaller."""
    script = "(paths) => paths.map((path) => path.getAttribute('d').split('z').length - 1)"
    return sum(thumbnail.locator(".kept").evaluate_all(script))


def test_the_strip_shows_the_tokens_that_each_frame_keeps(page: Page) -> None:
    frames = ask_about_video(page)
    assert len(frames) == FRAMES
    expect(strip(page)).to_have_count(FRAMES)
    expect(page.locator("#stops b")).to_have_text([f"{FRAMES * TOKENS}", *sums(frames)])
    for step in (1, 2, 3):
        show(page, step)
        for number, frame in enumerate(frames):
            kept = frame["stages"][step - 1]["tokens"]
            bits = np.frombuffer(base64.b64decode(frame["stages"][step - 1]["kept"]), np.uint8)
            assert kept == np.unpackbits(bits).sum() == kept_on(strip(page).nth(number))
            name = f"Frame {number + 1} of {FRAMES}, at {number}.0 s, {kept} of {TOKENS} tokens"
            expect(page.get_by_role("button", name=name, exact=True)).to_be_visible()
        total = sums(frames)[step - 1]
        expect(page.locator("#caption")).to_contain_text(f"In all frames: {total} of 864 tokens")
    assert frames[0]["stages"][0]["tokens"] > frames[1]["stages"][0]["tokens"]
    last = ", ".join(sums(frames))
    assert facts(page, 1)["Tokens kept"] == f"{last} of {FRAMES * TOKENS} in {FRAMES} frames"


def sums(frames: list[dict[str, Any]]) -> list[str]:
    """Tokens that all frames keep in each Stage."""
    stages = zip(*(frame["stages"] for frame in frames), strict=True)
    return [str(sum(stage["tokens"] for stage in stage_of_frames)) for stage_of_frames in stages]


def test_the_frame_shown_has_its_tokens_drawn_over_the_video(page: Page) -> None:
    frames = ask_about_video(page)
    show(page, 1)
    for number in (0, 3):
        strip(page).nth(number).click()
        assert current(page) == number + 1
        assert len(drawn(page, ".kept")) == frames[number]["stages"][0]["tokens"]
        assert len(drawn(page, ".kept, .dropped")) == TOKENS
        shapes = strip(page).nth(number).locator("path").evaluate_all(PATHS)
        assert page.locator("#cells path").evaluate_all(PATHS) == shapes


def test_thumbnails_of_the_strip_are_frames_of_the_video(page: Page) -> None:
    """The sample's colours: its star comes in after the first frame, its square after that."""
    ask_about_video(page)
    script = """(image, [x, y]) => {
      const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      context.drawImage(image, -Math.round(image.width * x), -Math.round(image.height * y));
      return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    }"""
    star, square = (90 / 336, 80 / 336), (180 / 336, 280 / 336)
    last = strip(page).last.locator("canvas")
    expect(page.locator("#strip")).not_to_have_attribute("aria-busy", "true")
    yellow, green = (last.evaluate(script, place) for place in (star, square))
    assert yellow[0] > 200
    assert yellow[1] > 170
    assert yellow[2] < 100
    assert green[1] > max(green[0], green[2]) + 50
    first = strip(page).first.locator("canvas")
    for place, colour in ((star, yellow), (square, green)):
        assert max(abs(np.subtract(first.evaluate(script, place), colour))) > 50


@pytest.mark.parametrize("place", ["#frame", "#strip [aria-current=true]"])
def test_keys_step_through_frames_and_play(page: Page, place: str) -> None:
    ask_about_video(page)
    seen = []
    page.locator(place).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", *["ArrowRight"] * 9):
        page.keyboard.press(key)
        seen.append(current(page))
        assert video_is(page, "currentTime") == pytest.approx(seen[-1] - 1, abs=0.01)
    assert seen == [2, 3, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6]
    expect(page.get_by_role("slider", name="Stage shown")).to_have_value("0")
    page.keyboard.press("ArrowLeft")
    if place != "#frame":
        expect(strip(page).nth(4)).to_be_focused()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert current(page) == 1
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.locator("#time")).to_have_text(re.compile(r"^(0\.[2-9]|[1-6])"))
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    assert video_is(page, "paused")
    assert video_is(page, "currentTime") >= 0.15  # the page shows it rounded


def test_the_slider_keeps_its_arrow_keys(page: Page) -> None:
    ask_about_video(page)
    page.get_by_role("slider", name="Stage shown").press("ArrowRight")
    expect(page.locator("#stops .chosen")).to_contain_text("Stage I")
    assert current(page) == 1


def test_the_frame_shown_follows_playback(page: Page) -> None:
    ask_about_video(page)
    show(page, 1)
    expect(page.locator("#time")).to_have_text("0.0 s of 6.0 s")
    position = page.get_by_role("slider", name="Position in the video")
    for second, number in ((2.5, 3), (0.4, 1), (5.9, 6), (0.9, 1)):
        position.fill(str(second))
        assert current(page) == number
    page.get_by_role("button", name="Play").click()
    expect(strip(page).nth(1)).to_have_attribute("aria-current", "true")
    page.get_by_role("button", name="Pause").click()
    assert video_is(page, "currentTime") >= 1
    assert current(page) == int(video_is(page, "currentTime")) + 1


def test_a_video_has_a_plan_after_its_first_question(page: Page) -> None:
    """Only the server knows how many frames it reads."""
    expect(page.locator("#caption")).to_contain_text("The server chooses the frames")
    expect(page.locator("#plan")).to_be_hidden()
    expect(page.locator("#strip")).to_be_hidden()
    with page.expect_response("**/v1/pruning/plan?*frames=12*"):
        ask_about_video(page)
    expect(page.locator("#chart")).to_contain_text(f"ratio 0: {FRAMES * TOKENS} in every layer")
    with page.expect_response("**/v1/pruning/plan?*frames=12*ratio=0.667"):
        page.get_by_role("button", name="0.667").click()
    expect(page.locator("#strip")).to_be_hidden()
    expect(page.locator("#caption")).to_contain_text("864 tokens, each for one part of one of 6")
    page.get_by_role("button", name="0.889").click()
    expect(page.locator("#strip")).to_be_visible()


def test_a_question_sends_the_video(page: Page) -> None:
    bodies: list[Any] = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.post_data else None)
    ask(page)
    urls = [body["messages"][0]["content"][0]["video_url"]["url"] for body in bodies]
    assert len(set(urls)) == len(urls) == 3  # two questions that share no cache, an explanation
    assert all(url.startswith("data:video/webm;base64,") for url in urls)


def test_an_own_video_replaces_the_sample(page: Page) -> None:
    ask_about_video(page)
    content = video_file(24, (160, 96), fps=8.0, kind="webm")
    upload(page, "mine.webm", "video/webm", content)
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 160 96")
    expect(page.locator("#strip")).to_be_hidden()
    expect(page.locator("#time")).to_have_text("0.0 s of 3.0 s")
    frames = ask_about_video(page)
    expect(strip(page)).to_have_count(len(frames))
    assert len(frames) == 3
    choose(page, "plum.png")
    for part in ("#video", "#playback", "#strip"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator("#image")).to_be_visible()
    page.locator("#frame").press("ArrowRight")
    expect(page.locator("#stops .chosen")).to_contain_text("Stage I")


def test_a_dropped_video_is_taken(page: Page) -> None:
    content = base64.b64encode(video_file(8, (64, 64), fps=8.0, kind="webm")).decode()
    script = """(content) => {
      const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], "dropped.webm", { type: "video/webm" }));
      const drop = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: data });
      document.querySelector("#frame").dispatchEvent(drop);
    }"""
    page.evaluate(script, content)
    expect(page.locator("#video")).to_have_attribute("aria-label", "dropped.webm")


def test_a_video_that_the_browser_cannot_play_is_refused(page: Page) -> None:
    upload(page, "mine.avi", "video/x-msvideo", video_file(8, (64, 64), kind="avi"))
    expect(page.get_by_role("alert")).to_contain_text("This browser cannot play this video.")
    expect(page.locator("#video")).to_have_attribute("aria-label", SAMPLE_NAME)


def test_frames_without_times_are_numbered_only(browser: Browser) -> None:
    with (
        serving(video_app(knows_times=False)) as url,
        video_page(browser, url) as page,
    ):
        frames = ask_about_video(page)
        show(page, 1)
        expect(strip(page)).to_have_count(FRAMES)
        expect(page.locator("#strip canvas")).to_have_count(0)
        kept = frames[1]["stages"][0]["tokens"]
        page.get_by_role("button", name=f"Frame 2 of 6, {kept} of 144 tokens", exact=True).click()
        assert current(page) == 2
        assert video_is(page, "currentTime") == 0
        expect(page.locator("#cells *")).to_have_count(0)
        expect(page.locator("#caption")).to_contain_text("does not know its time in the video")
        page.get_by_role("button", name="Play").click()
        expect(page.locator("#time")).to_have_text(re.compile(r"^(0\.[5-9]|[1-6])"))
        assert current(page) == 2
        expect(page.locator("#plan")).to_be_hidden()


def test_without_explanations_counts_of_frames_are_shown(browser: Browser) -> None:
    app = video_app()
    app.state.pruning_server_settings = ServerSettings(explain=False)
    with serving(app) as url, video_page(browser, url) as page:
        ask(page)
        assert facts(page, 0)["Tokens kept"] == "all 864 in 6 frames"
        expect(page.locator("#strip")).to_be_hidden()
        expect(page.locator("#caption")).to_contain_text("--server.explain true")


def test_a_model_without_videos_offers_none(browser: Browser) -> None:
    with serving(grid_app()) as url, opened(browser, url) as page:
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        for part in ("#video", "#playback", "#strip"):
            expect(page.locator(part)).to_be_hidden()
        expect(page.locator(f"#samples [value='{VIDEO_SAMPLE}']")).to_have_count(0)
        expect(page.locator("#file")).to_have_attribute("accept", "image/*")
        assert "video" not in page.locator("body").inner_text().lower()
        upload(page, "mine.webm", "video/webm", video_file(8, (64, 64), kind="webm"))
        expect(page.get_by_role("alert")).to_have_text(
            "This model takes no videos. Choose an image."
        )


@pytest.mark.parametrize(("width", "text_size"), [(320, 200), (1280, 100)])
def test_the_strip_does_not_widen_the_page(
    browser: Browser, video_url: str, width: int, text_size: int
) -> None:
    with video_page(browser, video_url, viewport={"width": width, "height": 800}) as page:
        page.evaluate(f"document.documentElement.style.fontSize = '{text_size}%'")
        ask_about_video(page)
        page.locator("#frame").press("ArrowRight")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        box, frame = (page.locator(part).bounding_box() for part in ("#strip", "#frame"))
        assert box is not None
        assert frame is not None
        assert box["width"] <= frame["width"]


def test_forced_colours_mark_the_frame_shown(browser: Browser, video_url: str) -> None:
    with video_page(browser, video_url, forced_colors="active") as page:
        ask_about_video(page)
        shadows = strip(page).evaluate_all(
            "(all) => all.map((button) => getComputedStyle(button).boxShadow)"
        )
        assert shadows[0] != "none"
        assert set(shadows[1:]) == {"none"}


def test_a_real_model_explains_the_sample(
    browser: Browser, checkpoint_of: Callable[[Family], Path]
) -> None:
    short = ("--override-generation-config", '{"max_new_tokens": 8}')
    options = (*TINY_OPTIONS, *short, "--server.explain", "true")
    with (
        running_server(str(checkpoint_of(QWEN2_5_VL)), *options) as (url, _),
        video_page(browser, url) as page,
    ):
        frames = ask_about_video(page)
        starts = [frame["times"][0] for frame in frames]
        assert starts == pytest.approx([*range(FRAMES)], abs=1 / FPS)
        expect(strip(page)).to_have_count(FRAMES)
        for step in (1, 2, 3):
            show(page, step)
            counts = [frame["stages"][step - 1]["tokens"] for frame in frames]
            assert [kept_on(strip(page).nth(number)) for number in range(FRAMES)] == counts
        kept = numbers(facts(page, 1)["Tokens kept"])
        assert kept == [*map(int, sums(frames)), FRAMES * TOKENS, FRAMES]
        expect(page.locator("#stops b")).to_have_text([str(FRAMES * TOKENS), *sums(frames)])
        expect(page.locator("#chart .count")).to_have_text(sums(frames))
        page.get_by_role("button", name="auto").click()
        expect(page.locator("#plan")).to_be_hidden()  # Only the answer tells its ratio.
        expect(page.locator("#caption")).to_contain_text("auto chooses the ratio")
        frames = ask_about_video(page)
        assert facts(page, 1)["Removed"].endswith("chosen by auto")
        kept = numbers(facts(page, 1)["Tokens kept"])
        assert kept == [*map(int, sums(frames)), FRAMES * TOKENS, FRAMES]
        expect(page.locator("#stops b")).to_have_text([str(FRAMES * TOKENS), *sums(frames)])
