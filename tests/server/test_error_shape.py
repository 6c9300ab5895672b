"""All errors have the same shape."""

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vitcop_server.errors import (
    OpenAIErrorMiddleware,
    RequestError,
    answer_deep_nesting,
    error_body,
    use_openai_errors,
)

ANTHROPIC = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
WHOLE = error_body("no", "BadRequestError", 400, "n")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    init_exception_handler(app)
    app.add_exception_handler(RecursionError, answer_deep_nesting)
    app.add_middleware(AuthenticationMiddleware, tokens=["key"])
    app.add_middleware(OpenAIErrorMiddleware)
    answers: dict[str, Response] = {
        "anthropic": JSONResponse(ANTHROPIC, 400),
        "whole": JSONResponse(WHOLE, 400, {"X-Request-Id": "7"}),
        "text": PlainTextResponse("went wrong", 500),
        "none": Response(status_code=503, headers={"Retry-After": "9"}),
        "busy": JSONResponse(error_body("busy", "ServiceUnavailableError", 503), 503),
        "list": JSONResponse(["a"], 400),
        "deep": Response("[" * 20000, 400, media_type="application/json"),
        "odd": JSONResponse({}, 499),
        "html": Response("<p>", 404, media_type="text/html"),
        "large": PlainTextResponse("x" * 200_000, 500),
        "pieces": StreamingResponse(iter([b'{"detail":', b'"a"}']), 400, media_type="text/plain"),
        "fine": JSONResponse({"detail": "fine"}),
    }

    @app.api_route("/answer/{name}", methods=["GET", "HEAD"])
    async def answer(name: str) -> Response:
        return answers[name]

    @app.post("/json")
    async def parsed(body: dict[str, str]) -> None:
        raise RecursionError

    @app.post("/request_error")
    async def request_error(request: Request) -> None:
        raise RequestError("no", "n")

    @app.get("/v1/messages")
    @app.get("/v1/messages/{name}")
    async def message(status: int) -> Response:
        return JSONResponse(error_body("no", "x", status), status)

    @app.get("/detail")
    async def detail() -> None:
        raise HTTPException(409, "taken")

    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "message"),
    [
        ("GET", "/v1/models", 401, "UnauthorizedError", "Unauthorized"),
        ("GET", "/nothing", 404, "NotFoundError", "Not Found"),
        ("GET", "/json", 405, "MethodNotAllowedError", "Method Not Allowed"),
        ("GET", "/detail", 409, "Conflict", "taken"),
        ("GET", "/answer/text", 500, "InternalServerError", "went wrong"),
        ("GET", "/answer/none", 503, "ServiceUnavailableError", "Service Unavailable"),
        ("GET", "/answer/list", 400, "BadRequestError", '["a"]'),
        ("GET", "/answer/deep", 400, "BadRequestError", "[" * 20000),
        ("GET", "/answer/odd", 499, "Error", "Error"),
        ("GET", "/answer/pieces", 400, "BadRequestError", "a"),
        ("POST", "/json", 400, "BadRequestError", "There was an error parsing the body"),
    ],
)
def test_every_error_has_the_shape(
    client: TestClient, method: str, path: str, status: int, kind: str, message: str
) -> None:
    body = "[" * 20000 if method == "POST" else None
    headers = {"content-type": "application/json"}
    answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json() == error_body(message, kind, status)
    assert answer.headers["content-type"] == "application/json"


def test_our_uncaught_errors_have_the_shape(client: TestClient) -> None:
    assert client.post("/request_error").json() == WHOLE
    assert (
        client.post("/json", json={}).json()["error"]["message"] == "the body is nested too deeply"
    )


def test_other_headers_are_kept(client: TestClient) -> None:
    assert client.get("/answer/none").headers["Retry-After"] == "9"
    assert client.get("/answer/whole").headers["X-Request-Id"] == "7"
    assert client.get("/nothing", headers={"Origin": "x"}).headers["content-length"]


def test_a_busy_server_sends_retry_after(client: TestClient) -> None:
    answer = client.get("/answer/busy")
    assert answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["message"] == "busy"


def test_a_complete_error_is_kept(client: TestClient) -> None:
    assert client.get("/answer/whole").content == json.dumps(WHOLE, separators=(",", ":")).encode()
    body: dict[str, Any] = client.get("/answer/anthropic").json()
    assert body["type"] == "error"
    assert body["error"] == ANTHROPIC["error"] | {"param": None, "code": 400}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (501, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic_s_routes_have_anthropic_s_shape(
    client: TestClient, path: str, status: int, kind: str
) -> None:
    headers = {"Authorization": "Bearer key"}
    answer = client.get(path, params={"status": status}, headers=headers)
    assert answer.status_code == status
    error = {"message": "no", "type": kind, "param": None, "code": status}
    assert answer.json() == {"type": "error", "error": error}


def test_a_wrong_key_on_anthropic_s_routes_has_its_shape(client: TestClient) -> None:
    answer = client.post("/v1/messages")
    assert answer.status_code == 401
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(("name", "body"), [("html", "<p>"), ("large", "x" * 200_000)])
def test_html_and_large_errors_pass_unchanged(client: TestClient, name: str, body: str) -> None:
    assert client.get(f"/answer/{name}").text == body


def test_success_and_head_pass_unchanged(client: TestClient) -> None:
    assert client.get("/answer/fine").json() == {"detail": "fine"}
    assert client.head("/answer/none").status_code == 503


def test_it_wraps_the_operator_s_middleware() -> None:
    args = Namespace(middleware=["their.Own"])
    use_openai_errors(args)
    assert args.middleware == ["their.Own", "vitcop_server.errors.OpenAIErrorMiddleware"]
