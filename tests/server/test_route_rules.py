"""All routes with a model, and the places of a ratio on each."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from vitcop_server.route_rules import ROUTES, rules_of

HEADER = "X-Pruning-Ratio"
HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/chat/completions/batch": {"messages": [HELLO]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/pruning/explain": {"messages": HELLO},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": HELLO},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"messages": HELLO},
    "/detokenize": {"tokens": [5]},
    "/generative_scoring": {"query": "Hi", "items": ["Hi"], "label_token_ids": [5]},
}
"""Routes with a model, each with a valid body."""

NOT_IMPLEMENTED = {"/v1/systemone"}
"""Routes with a model that vLLM does not implement for LLaVA."""

NEWER = {"/v1/decisions"}
"""Such routes that vLLM 0.32 does not have."""

WITHOUT_MODEL = {
    "/invocations",  # has no schema; see test_invocations
    "/is_scaling_elastic_ep",
    "/ping",
    "/v1/pruning/image",
    "/scale_elastic_ep",
    "/v1/responses/{response_id}/cancel",
}


def scope(path: str, root_path: str = "") -> dict[str, Any]:
    return {"type": "http", "path": root_path + path, "root_path": root_path}


@pytest.mark.parametrize("path", ROUTES)
def test_a_proxy_s_prefix_does_not_change_rules(path: str) -> None:
    assert rules_of(scope(path)) is rules_of(scope(path, "/prefix")) is ROUTES[path]


def test_other_routes_have_rules() -> None:
    assert not rules_of(scope("/v1/responses/resp_1/cancel")).is_inference
    assert rules_of(scope("/v1/messages/render")).is_anthropic
    assert not rules_of(scope("/v1/messages2")).is_anthropic
    unknown = rules_of(scope("/v1/nothing"))
    assert unknown.is_inference
    assert unknown.is_body_read
    assert not unknown.ratio_places


@pytest.fixture(scope="module")
def http(demo_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> str:
    return "demo"


def takes_model(schema: dict[str, Any], node: Any) -> bool:
    """Whether a schema, or one of its alternatives, has the property ``model``."""
    if "$ref" in node:
        node = schema["components"]["schemas"][node["$ref"].rpartition("/")[2]]
    alternatives = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
    return "model" in node.get("properties", {}) or any(
        takes_model(schema, alternative) for alternative in alternatives
    )


@pytest.mark.slow
def test_this_file_lists_all_routes(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    routes: dict[bool, set[str]] = {True: set(), False: set()}
    for path, operations in schema["paths"].items():
        if "post" in operations:
            content = operations["post"].get("requestBody", {}).get("content", {})
            has_model = any(takes_model(schema, kind["schema"]) for kind in content.values())
            routes[has_model].add(path)
    assert routes[True] - NEWER == BODIES.keys() | NOT_IMPLEMENTED
    assert routes[False] == WITHOUT_MODEL
    named = [path for path, get in schema["paths"].items() if "get" in get and "model" in path]
    assert named == ["/v1/models"]


def send(http: httpx.Client, route: str, model: str, **options: Any) -> httpx.Response:
    limit = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
    return http.post(route, json={"model": model, limit: 1, **BODIES[route]}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("route", BODIES)
def test_an_alias_works_on_every_route(http: httpx.Client, model: str, route: str) -> None:
    plain, alias = (send(http, route, name) for name in (model, f"{model}@0.5"))
    assert (plain.status_code, alias.status_code) == (200, 200), (plain.text, alias.text)
    assert send(http, route, "nobody@0.5").status_code == 404
    for ratio in ("2", "", "x"):
        wrong = send(http, route, f"{model}@{ratio}")
        assert wrong.status_code == 400
        assert "from 0 to 0.95" in wrong.json()["error"]["message"]
        assert ("type" in wrong.json()) == ("messages" in route)


@pytest.mark.slow
@pytest.mark.parametrize("route", BODIES)
def test_a_header_is_accepted_or_refused(http: httpx.Client, model: str, route: str) -> None:
    answer = send(http, route, model, headers={HEADER: "0.5"})
    if HEADER in ROUTES[route].ratio_places:
        assert (answer.status_code, answer.headers[HEADER]) == (200, "0.5")
        assert send(http, route, f"{model}@0.5").headers[HEADER] == "0.5"
    else:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == HEADER


@pytest.mark.slow
@pytest.mark.parametrize("route", ["/v1/systemone", "/v1/chat/completions/render", "/v1/nothing"])
def test_an_alias_is_refused_where_its_ratio_would_be_ignored(
    http: httpx.Client, model: str, route: str
) -> None:
    answer = http.post(route, json={"model": f"{model}@0.5"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert "/v1/chat/completions" in answer.json()["error"]["message"]
