"""Answers with and without pruning, and the visual tokens that each stage kept."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Request, expect

from tests.pruning.photographs import photo
from tests.server.page.grid_server import grid_app, serving
from tests.server.page.person import (
    SAMPLES,
    answers,
    ask,
    choose,
    drawn,
    encoded,
    facts,
    hold,
    numbers,
    opened,
    upload,
)

pytestmark = pytest.mark.slow


def test_two_answers_with_their_times_and_counts(page):
    ask(page)
    assert answers(page) == ["PLUM", "PLUM"]
    full, pruned = facts(page, 0), facts(page, 1)
    for pane in (full, pruned):
        assert 0 < numbers(pane["First token"])[0] <= numbers(pane["Last token"])[0]
    assert (full["Tokens kept"], pruned["Tokens kept"]) == ("all 576", "172, 77, 15 of 576")
    expect(page.locator("#summary")).to_contain_text("The same answer with 89\u00a0%")


def test_questions_are_asked_in_turn_and_share_no_cache(page):
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
    # The images differ too, so that the encoder's output is not shared.
    images = [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert images[0][:1000] == images[1][:1000]
    assert images[0] != images[1]


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
        clusters, anchors = drawn(page, ".cluster"), drawn(page, ".kept.anchor")
        assert len(clusters) == len(anchors)
        every = drawn(page, ".kept:not(.anchor), .member, .dropped")
        assert len(every) == encoder  # each part of the image is one of these
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


def test_arrow_keys_on_image_and_slider_change_the_stage(page):
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


def test_cells_cover_the_part_that_the_processor_crops(page):
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


def test_answers_keep_their_question_and_ratio(page):
    ask(page)
    expect(page.locator("#answers-title")).to_have_text("Answers to “What does the sign say?”")
    facts_before = facts(page, 1)
    assert drawn(page, ".heat")
    page.get_by_role("button", name="0.778").click()
    page.get_by_role("textbox", name="Question").fill("Where is the purple moon?")
    # The new ratio shows only its plan.
    expect(page.locator("#plan h2")).to_contain_text("at ratio 0.778")
    expect(page.locator("#caption")).to_contain_text("Ask a question to see")
    assert not drawn(page, "g path")
    expect(page.locator("#pruned-title")).to_have_text("Ratio 0.889")
    expect(page.locator("#answers-title")).to_have_text("Answers to “What does the sign say?”")
    assert (answers(page), facts(page, 1)) == (["PLUM", "PLUM"], facts_before)
    page.get_by_role("button", name="0.889").click()
    expect(page.locator("#cells .heat").first).to_be_visible()


def test_changes_while_asking_apply_to_the_next_question(page):
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    held = hold(page, "**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("textbox", name="Question").fill("Where is the purple moon?")
    page.get_by_role("spinbutton", name="Ratio").fill("0.5")
    held[0].continue_()
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    assert [request.headers["x-pruning-ratio"] for request in sent] == ["0", "0.889", "0.889"]
    for request in sent:
        assert "What does the sign say?" in (request.post_data or "")
    assert answers(page) == ["PLUM", "PLUM"]
    expect(page.locator("#pruned-title")).to_have_text("Ratio 0.889")
    assert facts(page, 1)["Removed"] == "89\u00a0%"
    page.get_by_role("button", name="0.889").click()  # This ratio has kept tokens to show.
    expect(page.locator("#cells .heat").first).to_be_visible()


def test_another_image_clears_answers_and_tokens(page):
    ask(page)
    assert drawn(page, ".heat")
    page.route("**/v1/pruning/plan**", lambda route: None)  # never answered
    choose(page, "bank.png")
    expect(page.locator("#cells")).to_have_attribute("viewBox", "0 0 504 336")
    page.locator("#frame").press("ArrowRight")
    expect(page.locator("#cells > *")).to_have_count(0)
    expect(page.locator("#canvas")).not_to_have_class("heat")
    assert answers(page) == ["", ""]
    expect(page.locator("#summary")).to_be_empty()
    expect(page.locator("#answers-title")).to_have_text("Answers")


def test_a_failed_plan_hides_the_old_plan(page):
    page.route("**/v1/pruning/plan**", lambda route: route.abort())
    page.get_by_role("button", name="0.667").click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.locator("#plan")).to_be_hidden()
    expect(page.locator("#stops li")).to_have_count(0)
    page.unroute("**/v1/pruning/plan**")
    page.get_by_role("button", name="0.778").click()
    expect(page.locator("#plan h2")).to_contain_text("at ratio 0.778")


def test_without_explanations_counts_are_shown(browser, server_url):
    urls: list[str] = []
    with opened(browser, server_url) as page:
        page.on("request", lambda request: urls.append(request.url))
        expect(page.locator("#stops li")).to_have_count(4)
        # The plan may load before the sample image.
        expect(page.locator("#samples [aria-pressed=true]")).to_have_count(1)
        ask(page)
        *counts, encoder = numbers(facts(page, 1)["Tokens kept"])
        assert encoder == 256
        for stage, count in enumerate(counts, 1):
            page.locator("#frame").press("ArrowRight")
            expect(page.locator("#caption")).to_contain_text(f"{count} of {encoder} tokens")
            expect(page.get_by_role("slider", name="Stage shown")).to_have_value(str(stage))
        expect(page.locator("#caption")).to_contain_text("--server.explain true")
        assert not drawn(page, "g path")
    assert not [address for address in urls if "explain" in address]


def test_every_control_has_an_accessible_name(page):
    for role, name in [
        ("textbox", "Question"),
        ("spinbutton", "Ratio: the share of visual tokens removed, averaged over layers"),
        ("slider", "Ratio, as a slider"),
        ("slider", "Stage shown"),
        ("group", "Image. The left and right arrow keys change the stage shown."),
        ("img", "Coloured shapes and a sign on a photograph of a coffee cup"),
        ("article", "Ratio 0"),
        ("article", "Ratio 0.889"),
    ]:
        expect(page.get_by_role(role, name=name, exact=True).first).to_be_visible()
    for button in page.locator("button:visible").all():
        assert button.inner_text() or button.locator("img[alt]").count()
    assert page.locator("#answers [aria-live=polite]").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scrolling(browser, url, scheme):
    phone = {"width": 360, "height": 780}
    with opened(browser, url, viewport=phone, color_scheme=scheme) as page:
        expect(page.locator("#stops li")).to_have_count(4)
        ask(page)
        for _ in range(4):
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            page.locator("#frame").press("ArrowRight")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(numbers(colour)) < 3 * 128) == (scheme == "dark")


def test_auto_chooses_a_ratio_for_each_image(page):
    """Its plan, its facts and the tokens drawn are those of the ratio that the server chose."""
    auto = page.get_by_role("button", name="auto", exact=True)
    expect(auto).to_have_attribute("aria-pressed", "false")
    auto.click()
    expect(auto).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#pruned-title")).to_have_text("Ratio auto")
    shown: list[list[int]] = []
    for ratio in ("0.7778", "0.9167"):
        if shown:  # The sample has a sign, this photograph has no text.
            upload(page, "coffee", "image/png", encoded(photo("coffee")))
            expect(page.locator("#image")).to_have_attribute("alt", "coffee")
            page.get_by_role("textbox", name="Question").fill("What does the sign say?")
        expect(page.locator("#plan h2")).to_contain_text(f"at ratio {ratio}, chosen by auto")
        expect(page.get_by_role("spinbutton", name="Ratio")).to_have_value(ratio)
        planned = page.locator("#stops b").all_inner_texts()
        with page.expect_request(lambda sent: sent.headers.get("x-pruning-ratio") == "auto"):
            ask(page)
        told = facts(page, 1)
        *counts, encoder = numbers(told["Tokens kept"])
        assert [str(count) for count in (encoder, *counts)] == planned
        removed = float(told["Removed"].split("\u00a0")[0]) / 100
        assert removed == pytest.approx(float(ratio), abs=0.002)
        assert told["Removed"].endswith("%, chosen by auto")
        assert "auto" not in facts(page, 0)["Removed"]
        expect(page.locator("#stops b")).to_have_text(planned)
        page.locator("#frame").focus()
        for count in counts:
            page.keyboard.press("ArrowRight")
            assert len(drawn(page, ".kept")) == count
        page.get_by_role("slider", name="Stage shown").fill("0")
        shown.append(counts)
    assert all(sign > plain for sign, plain in zip(*shown, strict=True))


def test_a_ratio_takes_the_place_of_auto(page):
    auto, ratio = page.get_by_role("button", name="auto"), page.get_by_role("spinbutton")
    auto.click()
    expect(ratio).to_have_value("0.7778")
    ratio.fill("")  # An incomplete number changes nothing.
    expect(auto).to_have_attribute("aria-pressed", "true")
    ratio.fill("0.5")
    expect(auto).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#pruned-title")).to_have_text("Ratio 0.5")
    expect(page.locator("#plan h2")).to_have_text(re.compile("at ratio 0.5$"))


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [
        ({"max_pruning_ratio": 0.5}, None),
        ({"auto": {"min": 0.5, "max": 0.5}, "default_ratio": "auto"}, "0.5"),
        ({"default_ratio": "auto"}, "auto"),
    ],
)
def test_auto_is_offered_if_it_has_a_choice(browser, settings, ratio):
    with serving(grid_app(**settings)) as url, opened(browser, url) as page:
        expect(page.locator("#stops li")).to_have_count(4)
        expect(page.get_by_role("button", name="auto")).to_have_count(int(ratio == "auto"))
        if ratio is not None:
            expect(page.locator("#pruned-title")).to_have_text(f"Ratio {ratio}")
