"""A running server chooses a ratio for each image: ``auto``, and budgets of visual tokens."""

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.server.clients import CHAT, metrics

pytestmark = pytest.mark.slow

RATIO, BUDGET, MAX = "X-Pruning-Ratio", "X-Pruning-Budget", "X-Pruning-Max"


def image_part(lines: int, side: int = 336) -> dict[str, Any]:
    """An image with lines of text."""
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=side // 24)
    for number in range(lines):
        place = (side // 60, number * side // 16)
        ImageDraw.Draw(image).text(place, "Text, text, and more text", "black", font)
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


PLAIN, PAGE = image_part(0), image_part(16)


def body(model: str, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 4, **fields}


def ask(
    http: httpx.Client, model: str, *parts: dict[str, Any], headers: Any = None, **fields: Any
) -> httpx.Response:
    answer = http.post(CHAT, json=body(model, *parts, **fields), headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer


def test_auto_keeps_more_of_a_page_than_of_a_plain_image(http: httpx.Client, model: str) -> None:
    auto = {RATIO: "auto"}
    plain, page = (ask(http, model, part, headers=auto) for part in (PLAIN, PAGE))
    assert plain.headers[RATIO] == page.headers[RATIO] == "auto"
    for answer, part, ratio in ((plain, PLAIN, 11 / 12), (page, PAGE, 7 / 9)):
        named = ask(http, model, part, headers={RATIO: str(ratio)})
        for field in ("pruning_ratio", "visual_tokens", "prompt_tokens"):
            assert answer.json()["usage"][field] == named.json()["usage"][field]
        assert answer.json()["choices"] == named.json()["choices"]
    both = ask(http, model, PLAIN, PAGE, headers=auto).json()["usage"]
    stages = [answer.json()["usage"]["visual_tokens"]["stages"] for answer in (plain, page)]
    assert both["visual_tokens"]["stages"] == [sum(kept) for kept in zip(*stages, strict=True)]


@pytest.mark.parametrize("fields", [{"pruning_ratio": "auto"}, {"model": "{}@auto"}])
def test_auto_may_be_a_field_or_part_of_the_model_s_name(
    http: httpx.Client, model: str, fields: dict[str, str]
) -> None:
    filled = {key: value.format(model) for key, value in fields.items()}
    answer = http.post(CHAT, json={**body(model, PAGE), **filled})
    assert answer.status_code == 200, answer.text
    assert answer.headers[RATIO] == "auto"
    expected = ask(http, model, PAGE, headers={RATIO: "auto"}).json()["usage"]
    assert answer.json()["usage"]["visual_tokens"] == expected["visual_tokens"]


def test_the_client_s_maximum_limits_auto(http: httpx.Client, model: str) -> None:
    limited = ask(http, model, PLAIN, headers={RATIO: "auto", MAX: "0.5"}).json()["usage"]
    named = ask(http, model, PLAIN, headers={RATIO: "0.5"}).json()["usage"]
    assert limited["visual_tokens"] == named["visual_tokens"]


def test_a_budget_is_what_an_image_keeps_averaged_over_layers(
    http: httpx.Client, model: str
) -> None:
    answer = ask(http, model, PAGE, headers={BUDGET: "24"})
    assert answer.headers[BUDGET] == "24"
    assert RATIO not in answer.headers
    usage = answer.json()["usage"]
    kept = (1 - usage["pruning_ratio"]) * usage["visual_tokens"]["encoder"]
    assert kept == pytest.approx(24, abs=2)
    field = ask(http, model, PAGE, pruning_budget=24).json()["usage"]
    assert field["visual_tokens"] == usage["visual_tokens"]
    large = ask(http, model, PAGE, headers={BUDGET: "100000"}).json()["usage"]
    assert large["pruning_ratio"] == 0


@pytest.mark.parametrize(
    ("headers", "fields", "param", "words"),
    [
        ({BUDGET: "0"}, {}, BUDGET, "integer of at least 1"),
        ({BUDGET: "many"}, {}, BUDGET, "integer of at least 1"),
        ({}, {"pruning_budget": 1.5}, "pruning_budget", "integer of at least 1"),
        ({BUDGET: "24", RATIO: "0.5"}, {}, "pruning_budget", "send one of them"),
        ({BUDGET: "24"}, {"pruning_budget": 25}, "pruning_budget", "the same in both"),
        ({RATIO: "automatic"}, {}, RATIO, "'auto' chooses"),
    ],
)
def test_bad_amounts_are_refused(
    http: httpx.Client,
    model: str,
    headers: dict[str, str],
    fields: dict[str, Any],
    param: str,
    words: str,
) -> None:
    answer = http.post(CHAT, json=body(model, PLAIN, **fields), headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("headers", [{BUDGET: "24"}, {RATIO: "auto"}])
def test_other_routes_take_the_same_amounts(
    http: httpx.Client, model: str, headers: dict[str, str]
) -> None:
    expected = ask(http, model, PAGE, headers=headers).json()["usage"]
    chat = body(model, PAGE)
    counted = http.post("/tokenize", json=chat, headers=headers)
    assert counted.json()["count"] == expected["prompt_tokens"]
    image = PAGE["image_url"]["url"]
    parts = [
        {"type": "input_image", "image_url": image, "detail": "auto"},
        {"type": "input_text", "text": "What is this?"},
    ]
    response = http.post(
        "/v1/responses",
        json={"model": model, "input": [{"role": "user", "content": parts}]},
        headers=headers,
    )
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["visual_tokens"] == expected["visual_tokens"]
    source = {"type": "base64", "media_type": "image/png", "data": image.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    message = {"model": model, "messages": [{"role": "user", "content": content}]}
    counted = http.post("/v1/messages/count_tokens", json=message, headers=headers)
    assert counted.json()["input_tokens"] == expected["prompt_tokens"]


def test_a_plan_takes_a_budget_and_explains_that_auto_needs_the_image(http: httpx.Client) -> None:
    plan = http.get("/v1/pruning/plan", params={"budget": 24}).json()
    assert (1 - plan["effective_ratio"]) * plan["encoder_tokens"] == pytest.approx(24, abs=2)
    refused = http.get("/v1/pruning/plan", params={"ratio": "auto"})
    assert refused.status_code == 400
    assert "auto depends on the image" in refused.json()["error"]["message"]


@pytest.mark.parametrize("part", [PLAIN, PAGE], ids=["plain", "page"])
def test_the_ratio_that_auto_chooses_for_an_image_is_known_before_a_question(
    http: httpx.Client, model: str, part: dict[str, Any]
) -> None:
    image = http.post("/v1/pruning/image", json={"image_url": part["image_url"]["url"]}).json()
    size = {"width": image["width"], "height": image["height"]}
    plan = http.get("/v1/pruning/plan", params={"ratio": image["auto_ratio"], **size}).json()
    usage = ask(http, model, part, headers={RATIO: "auto"}).json()["usage"]
    assert usage["pruning_ratio"] == plan["effective_ratio"]
    assert usage["visual_tokens"]["stages"] == [stage["tokens"] for stage in plan["stages"]]


def test_a_route_without_amounts_refuses_a_budget(http: httpx.Client, model: str) -> None:
    answer = http.post("/detokenize", json={"model": model, "tokens": [1]}, headers={BUDGET: "24"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == BUDGET


def test_requests_are_counted_by_what_was_dropped(http: httpx.Client, model: str) -> None:
    name = 'vitcop_requests_total{ratio="0.9-1"}'
    before = metrics(http).get(name, 0)
    ask(http, model, PLAIN, headers={RATIO: "auto"})
    assert metrics(http)[name] == before + 1
