"""All errors of ``/v1/messages`` have Anthropic's shape."""

from typing import Any

import httpx
import pytest

from tests.server.clients import MAX_BODY, Server

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"
JSON = {"Content-Type": "application/json"}
ROUTES = ["/v1/messages", "/v1/messages/count_tokens"]


def assert_anthropic(answer: httpx.Response, status: int, kind: str, words: str = "") -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"type", "error"}
    assert body["type"] == "error"
    assert (body["error"]["type"], body["error"]["code"]) == (kind, status)
    assert words in body["error"]["message"]


def ask(server: Server, route: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 1, **fields}
    return server.http.post(route, json=body, headers=headers)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headers": {HEADER: "3"}}, "from 0 to 0.95"),
        ({"pruning_ratio": 0.5}, f"send header {HEADER}"),
        ({"mm_processor_kwargs": {}}, f"send header {HEADER}"),
        ({"vllm_xargs": {"pruning_ratio": 0.5}}, f"send header {HEADER}"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "content parts"),
    ],
    ids=["header", "field", "keywords", "xargs", "validation", "placeholder"],
)
def test_a_bad_request_is_a_400(
    server: Server, route: str, options: dict[str, Any], words: str
) -> None:
    answer = ask(server, route, **options)
    assert_anthropic(answer, 400, "invalid_request_error", words)
    # Only the header works on this route.
    assert "body field" not in answer.text
    assert "/v1/chat/completions" not in answer.text


@pytest.mark.parametrize("route", ROUTES)
def test_other_errors_have_the_shape(server: Server, route: str) -> None:
    no_json = server.http.post(route, content="{", headers=JSON)
    assert_anthropic(no_json, 400, "invalid_request_error")
    deep = server.http.post(route, content="[" * 20_000, headers=JSON)
    assert_anthropic(deep, 400, "invalid_request_error")
    assert_anthropic(server.http.get(route), 405, "invalid_request_error")
    unknown = ask(server, route, model="nobody")
    assert_anthropic(unknown, 404, "not_found_error", "nobody")
    assert_anthropic(ask(server, f"{route}/nothing"), 404, "not_found_error")


@pytest.mark.parametrize("route", ROUTES)
def test_errors_of_configured_limits_have_the_shape(guarded: Server, route: str) -> None:
    wrong_key = ask(guarded, route, headers={"Authorization": "Bearer no"})
    assert_anthropic(wrong_key, 401, "authentication_error")
    large = guarded.post(route, b"x" * (MAX_BODY + 1))
    assert_anthropic(large, 413, "request_too_large", str(MAX_BODY))
