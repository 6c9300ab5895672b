"""Headers that pages of other origins may read, and HEAD requests."""

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.middleware.cors import CORSMiddleware

from vitcop_server.cors import EXPOSED_HEADERS, ExposeHeaders

NAME = "Access-Control-Expose-Headers"
ORIGIN = {"Origin": "http://app.example"}


@pytest.mark.parametrize("already", [(), ("X-Other",)])
def test_headers_are_exposed_to_allowed_origins(already: tuple[str, ...]) -> None:
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN["Origin"]], expose_headers=already)
    app.add_middleware(ExposeHeaders)
    with TestClient(app) as client:
        exposed = client.get("/", headers=ORIGIN).headers[NAME].split(", ")
        assert sorted(exposed) == sorted({*already, *EXPOSED_HEADERS})
        stranger = client.get("/", headers={"Origin": "http://other.example"})
        assert (NAME in stranger.headers) == bool(already)
        assert NAME not in client.get("/").headers


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["0.5", "2"])
def test_other_origins_may_read_the_ratio_header(server_url: str, model: str, ratio: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    headers = {**ORIGIN, "X-Pruning-Ratio": ratio}
    answer = httpx.post(f"{server_url}/v1/chat/completions", json=body, headers=headers)
    assert (answer.status_code == 200) == (ratio == "0.5")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert {"X-Pruning-Ratio", "X-Request-Id", "Retry-After"} <= set(
        answer.headers[NAME].split(", ")
    )
    assert NAME not in httpx.get(f"{server_url}/health").headers


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/ready", "/v1/pruning/config", "/v1/pruning/plan"])
def test_head_has_the_headers_of_get(server_url: str, path: str) -> None:
    answer = httpx.head(server_url + path)
    assert answer.status_code == 200
    assert answer.content == b""
    assert (
        answer.headers["content-length"] == httpx.get(server_url + path).headers["content-length"]
    )
