"""The ratio header: reported on routes that accept a ratio, refused on others."""

import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, StreamingResponse

from vitcop_server.middleware import STATE_KEY, PruningMiddleware
from vitcop_vllm.pruning.amount import FixedRatio

HEADER = "X-Pruning-Ratio"
OTHER = "/v1/embeddings"


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.add_middleware(PruningMiddleware)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        setattr(request.state, STATE_KEY, FixedRatio(1e-05))
        return StreamingResponse(iter(["a", "b"]))

    @app.post("/v1/completions")
    async def completions(request: Request) -> JSONResponse:
        setattr(request.state, STATE_KEY, FixedRatio(0.5))
        return JSONResponse({}, status_code=404)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def other(request: Request) -> dict[str, str]:
        return {"body": (await request.body()).decode("latin-1")}

    with TestClient(app) as client:
        yield client


def test_ratio_is_reported_on_success(client: TestClient) -> None:
    assert client.post("/v1/chat/completions").headers[HEADER] == "0.00001"


def test_ratio_is_not_reported_on_failure(client: TestClient) -> None:
    assert HEADER not in client.post("/v1/completions").headers


def test_the_header_on_other_routes_is_refused(client: TestClient) -> None:
    answer = client.post(OTHER, headers={HEADER: ""}, content=b"x" * 200_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == HEADER


@pytest.mark.parametrize("field", ["pruning_ratio", "mm_processor_kwargs", "media_io_kwargs"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_fields_on_other_routes_are_refused(client: TestClient, field: str, encoding: str) -> None:
    body = json.dumps({field: {}}).replace("p", "\\u0070").encode(encoding)
    answer = client.post(OTHER, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"pruning_ratio": null}',
        b'{"messages": [{"pruning_ratio": 1}]}',
        b"x" * 1_000_000,
    ],
    ids=lambda body: repr(body[:12]),
)
def test_other_bodies_arrive_whole(client: TestClient, body: bytes) -> None:
    answer = client.post(OTHER, content=body)
    assert answer.status_code == 200
    assert answer.json()["body"].encode("latin-1") == body


def test_body_in_pieces_arrives_whole(client: TestClient) -> None:
    answer = client.post(OTHER, content=iter([b"a", b"b", b"", b"c"]))
    assert answer.json()["body"] == "abc"


def test_features_from_clients_are_refused(client: TestClient) -> None:
    assert client.post("/inference/v1/generate", json={"features": {}}).status_code == 400
    assert client.post(OTHER, json={"features": {}}).status_code == 200


@pytest.mark.parametrize("path", ["/ping", "/start_profile", "/v1/responses/resp_1/cancel"])
def test_routes_without_inference_ignore_the_header(client: TestClient, path: str) -> None:
    assert client.post(path, headers={HEADER: "0.5"}).status_code == 200


def test_get_ignores_the_header(client: TestClient) -> None:
    assert client.get("/v1/models", headers={HEADER: "0.5"}).status_code == 200
