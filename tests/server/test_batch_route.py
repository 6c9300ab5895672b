"""Several conversations in one request: one ratio, one usage, the same answers as alone."""

from typing import Any

import httpx
import pytest

from tests.server.sample_images import chat_body, image_message
from vitcop_server.limits import MAX_ANSWERS

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
ROUTE = "/v1/chat/completions/batch"


def batch(model: str, *conversations: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": conversations,
        "max_tokens": 4,
        "temperature": 0,
        **fields,
    }


def alone(http: httpx.Client, model: str, *seeds: int, ratio: str) -> Any:
    body = chat_body(model, *seeds, max_tokens=4)
    answer = http.post("/v1/chat/completions", json=body, headers={HEADER: ratio})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("where", ["header", "field", "model"])
def test_conversations_get_the_answers_they_get_alone(
    http: httpx.Client, model: str, where: str
) -> None:
    headers = {HEADER: "0.667"} if where == "header" else {}
    fields: dict[str, dict[str, Any]] = {
        "field": {"pruning_ratio": 0.667},
        "model": {"model": f"{model}@0.667"},
    }
    conversations = [[image_message(7301)], [image_message(7302, 7303)]]
    body = batch(model, *conversations) | fields.get(where, {})
    answer = http.post(ROUTE, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers[HEADER] == "0.667"
    expected = [alone(http, model, *seeds, ratio="0.667") for seeds in ((7301,), (7302, 7303))]
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == [one["choices"][0]["message"]["content"] for one in expected]
    usage = answer.json()["usage"]
    tokens = [one["usage"]["visual_tokens"] for one in expected]
    assert usage["visual_tokens"]["encoder"] == sum(one["encoder"] for one in tokens)
    assert usage["visual_tokens"]["stages"] == [
        sum(stage) for stage in zip(*(one["stages"] for one in tokens), strict=True)
    ]
    assert 0.5 < usage["pruning_ratio"] < 0.8
    assert usage["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in expected)


def test_a_batch_without_images_reports_no_visual_tokens(http: httpx.Client, model: str) -> None:
    hello = [{"role": "user", "content": "Hi"}]
    answer = http.post(ROUTE, json=batch(model, hello, hello), headers={HEADER: "0.5"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["visual_tokens"] is None


def test_images_of_a_refused_batch_are_answered_afterwards(http: httpx.Client, model: str) -> None:
    """vLLM's cache holds the first image, but the second conversation kept it from the engine."""
    stray = [{"role": "user", "content": "What is <image>?"}]
    body = batch(model, [image_message(7310)], stray)
    refused = http.post(ROUTE, json=body, headers={HEADER: "0.5"})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "messages"
    assert HEADER not in refused.headers
    alone(http, model, 7310, ratio="0.5")


def test_a_batch_has_the_limit_on_answers(http: httpx.Client, model: str) -> None:
    hello = [{"role": "user", "content": "Hi"}]
    refused = http.post(ROUTE, json=batch(model, *[hello] * (MAX_ANSWERS + 1), max_tokens=1))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"
    assert str(MAX_ANSWERS) in refused.json()["error"]["message"]
    whole = http.post(ROUTE, json=batch(model, *[hello] * MAX_ANSWERS, max_tokens=1))
    assert whole.status_code == 200
    assert len(whole.json()["choices"]) == MAX_ANSWERS


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"pruning_ratio": 2},
        {"mm_processor_kwargs": {}},
        {"stream": True},
        {"tools": [TOOL]},
        {"prompt_logprobs": 0},
        {"return_prompt_text": True},
        {"echo": True, "add_generation_prompt": False},
    ],
)
def test_a_batch_is_refused_like_a_request(
    http: httpx.Client, model: str, fields: dict[str, Any]
) -> None:
    refused = http.post(ROUTE, json=batch(model, [image_message(1)], **fields))
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == next(iter(fields))


def test_fields_with_null_or_false_are_accepted(http: httpx.Client, model: str) -> None:
    body = batch(model, [image_message(1)], stream=False, tools=None, prompt_logprobs=None)
    answer = http.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
