"""Token counting agrees with usage, however the ratio is sent."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.sample_images import chat_body, png_url

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
RATIO = 0.889


@pytest.fixture(scope="module")
def http(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=120) as client:
        yield client


def message_body(model: str, *seeds: int) -> dict[str, Any]:
    sources = [
        {"type": "base64", "media_type": "image/png", "data": png_url(seed).partition(",")[2]}
        for seed in seeds
    ]
    content = [{"type": "image", "source": source} for source in sources]
    text = {"type": "text", "text": "What is this?"}
    return {"model": model, "messages": [{"role": "user", "content": [*content, text]}]}


WHERE: dict[str, dict[str, Any]] = {
    "nowhere": {},
    "header": {"headers": {HEADER: str(RATIO)}},
    "field": {"field": RATIO},
    "alias": {"model": f"demo@{RATIO}"},
}


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3), ()])
@pytest.mark.parametrize("where", ["nowhere", "header", "alias"])
def test_count_tokens_agrees_with_messages(
    http: httpx.Client, where: str, seeds: tuple[int, ...]
) -> None:
    options = dict(WHERE[where])
    body = message_body(options.pop("model", "demo"), *seeds)
    counted = http.post("/v1/messages/count_tokens", json=body, **options)
    assert counted.status_code == 200, counted.text
    assert float(counted.headers[HEADER]) == (0 if where == "nowhere" else RATIO)
    billed = http.post("/v1/messages", json=body | {"max_tokens": 1}, **options)
    assert counted.json()["input_tokens"] == billed.json()["usage"]["input_tokens"]


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3), ()])
@pytest.mark.parametrize("where", WHERE)
def test_tokenize_agrees_with_chat(http: httpx.Client, where: str, seeds: tuple[int, ...]) -> None:
    options = dict(WHERE[where])
    body = chat_body(options.pop("model", "demo"), *seeds)
    if "field" in options:
        body["pruning_ratio"] = options.pop("field")
    counted = http.post("/tokenize", json=body, **options)
    assert counted.status_code == 200, counted.text
    assert float(counted.headers[HEADER]) == (0 if where == "nowhere" else RATIO)
    billed = http.post("/v1/chat/completions", json=body | {"max_tokens": 1}, **options)
    assert counted.json()["count"] == billed.json()["usage"]["prompt_tokens"]
    assert len(counted.json()["tokens"]) == counted.json()["count"]


def test_the_ratio_does_not_change_text_tokens(http: httpx.Client) -> None:
    counts = [
        http.post("/tokenize", json={"model": model, "prompt": "What is this?"}).json()
        for model in ("demo", "demo@0.5")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("route", ["/v1/messages/count_tokens", "/tokenize"])
def test_a_bad_ratio_is_refused_and_the_header_wins(http: httpx.Client, route: str) -> None:
    body = message_body("demo") if "messages" in route else chat_body("demo")
    refused = http.post(route, json=body, headers={HEADER: "2"})
    assert refused.status_code == 400
    assert "0 to 0.95" in refused.json()["error"]["message"]
    assert HEADER not in refused.headers
    wins = http.post(route, json=body | {"model": "demo@0.3"}, headers={HEADER: "0.5"})
    assert wins.headers[HEADER] == "0.5"
