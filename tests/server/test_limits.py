"""The limit on bodies, in front of applications that read them differently."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from vitcop_server.limits import BodyLimit, limit_answers
from vitcop_server.middleware import PruningMiddleware

LIMIT = 1000


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.add_middleware(PruningMiddleware)
    app.add_middleware(BodyLimit, max_bytes=LIMIT)

    @app.post("/whole")
    async def whole(request: Request) -> int:
        return len(await request.body())

    @app.post("/json")
    async def parsed(body: dict[str, str]) -> int:
        return len(body)

    @app.post("/never")
    async def never() -> str:
        return "unread"

    with TestClient(app) as client:
        yield client


def pieces(size: int, piece: int = 100) -> Iterator[bytes]:
    """A chunked body, without Content-Length."""
    return (b"x" * piece for _ in range(size // piece))


def assert_too_large(answer: Any) -> None:
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("RequestTooLargeError", 413, None)
    assert f"server.max_body_bytes, {LIMIT} bytes" in error["message"]


@pytest.mark.parametrize("route", ["/whole", "/json", "/never", "/nothing"])
def test_a_body_over_the_limit_is_a_413(client: TestClient, route: str) -> None:
    assert_too_large(client.post(route, content=b"x" * (LIMIT + 1)))


@pytest.mark.parametrize("route", ["/whole", "/json", "/v1/responses"])
def test_a_chunked_body_over_the_limit_is_a_413(client: TestClient, route: str) -> None:
    assert_too_large(client.post(route, content=pieces(LIMIT + 100)))


def test_a_body_at_the_limit_passes(client: TestClient) -> None:
    assert client.post("/whole", content=b"x" * LIMIT).json() == LIMIT
    assert client.post("/whole", content=pieces(LIMIT)).json() == LIMIT


def test_the_client_is_usable_afterwards(client: TestClient) -> None:
    for body in (b"x" * 10 * LIMIT, pieces(10 * LIMIT)):
        assert client.post("/whole", content=body).status_code == 413
        assert client.post("/whole", content=b"x").json() == 1


def run(app: object, chunks: int) -> list[Message]:
    """Messages that a bare ASGI application sends, for chunks of half the limit."""
    left = [b"x" * (LIMIT // 2)] * chunks
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": "POST", "headers": []}
    asyncio.run(BodyLimit(app, LIMIT)(scope, receive, send))  # type: ignore[arg-type]
    return sent


async def gives_up(scope: Scope, receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    await gives_up(scope, receive, send)
    assert (await receive())["type"] != "http.disconnect"


async def answers_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await gives_up(scope, receive, send)
    await send({"type": "http.response.body", "body": b"done"})


async def echoes(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        message = await receive()
        more = message["more_body"]
        await send({**message, "type": "http.response.body"})


def test_pieces_stream_through() -> None:
    assert [len(message.get("body", b"")) for message in run(echoes, 2)] == [0, 500, 500]


@pytest.mark.parametrize("app", [gives_up, raises])
def test_an_application_without_an_answer_gets_a_413(app: object) -> None:
    assert [message.get("status") for message in run(app, 3)] == [413, None]


def test_a_started_answer_is_not_replaced() -> None:
    start, body = run(answers_at_once, 3)
    assert (start["status"], body["body"]) == (200, b"done")


def test_an_applications_own_errors_pass() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        run(fails, 1)


def test_the_operator_s_limit_on_answers_is_kept() -> None:
    chosen, unset = {"VLLM_MAX_N_SEQUENCES": "7"}, dict[str, str]()
    limit_answers(chosen)
    limit_answers(unset)
    assert chosen["VLLM_MAX_N_SEQUENCES"] == "7"
    assert unset["VLLM_MAX_N_SEQUENCES"] == "128"
