"""SageMaker's route, where vLLM drops the body's ``model`` before a handler sees it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.sample_images import chat_body

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
ROUTE = "/invocations"


@pytest.fixture(scope="module")
def http(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=120) as client:
        yield client


def invoke(http: httpx.Client, model: str = "demo", **options: Any) -> httpx.Response:
    fields = options.pop("fields", {})
    return http.post(ROUTE, json=chat_body(model, 1, max_tokens=2, **fields), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {HEADER: "0.889"}},
        {"fields": {"pruning_ratio": 0.889}},
        {"model": "demo@0.889"},
        {"headers": {ADAPTER: "demo@0.889"}},
        {"model": "demo@0.5", "headers": {HEADER: "0.889"}},
        {"model": "demo@0.5", "fields": {"pruning_ratio": 0.889}},
    ],
    ids=["header", "field", "alias", "adapter", "header wins", "field wins"],
)
def test_a_ratio_is_applied(http: httpx.Client, options: dict[str, Any]) -> None:
    answer = invoke(http, **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == "0.889"
    chat = http.post("/v1/chat/completions", json=chat_body("demo@0.889", 1, max_tokens=2))
    usage = answer.json()["usage"]
    assert usage["pruning_ratio"] > 0.8
    assert usage["visual_tokens"] == chat.json()["usage"]["visual_tokens"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"headers": {HEADER: "2"}}, HEADER),
        ({"fields": {"pruning_ratio": 2}}, "pruning_ratio"),
        ({"model": "demo@2"}, "model"),
        ({"headers": {ADAPTER: "demo@2"}}, "model"),
        ({"headers": {HEADER: "0.5"}, "fields": {"pruning_ratio": 0.6}}, "pruning_ratio"),
    ],
    ids=["header", "field", "alias", "adapter", "both"],
)
def test_a_bad_ratio_is_refused(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    answer = invoke(http, **options)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_streams_and_prompts_accept_a_ratio(http: httpx.Client) -> None:
    stream = invoke(http, "demo@0.889", fields={"stream": True})
    assert stream.headers[HEADER] == "0.889"
    assert stream.text.rstrip().endswith("data: [DONE]")
    prompt = http.post(ROUTE, json={"model": "demo@0.5", "prompt": "Hi", "max_tokens": 1})
    assert (prompt.status_code, prompt.headers[HEADER]) == (200, "0.5")


def test_vllm_checks_other_model_names(http: httpx.Client) -> None:
    assert invoke(http).json()["usage"]["pruning_ratio"] == 0
    assert invoke(http, "whoever@0.5").json()["usage"]["pruning_ratio"] == 0
    assert invoke(http, headers={ADAPTER: "nobody"}).status_code == 404
