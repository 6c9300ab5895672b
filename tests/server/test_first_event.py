"""A stream's status and headers come with its first event."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from vitcop_server.readiness import BeginWithFirstEvent, note_shutdown

EVENTS = ["data: a\n\n", "data: [DONE]\n\n"]


def app_answering(answer: Response, *, is_dead: bool = False) -> FastAPI:
    app = FastAPI()
    app.state.engine_client = SimpleNamespace(errored=is_dead)
    app.add_middleware(BeginWithFirstEvent)
    app.add_api_route("/", lambda: answer, methods=["POST"], response_class=Response)
    return app


async def call(app: FastAPI, sent: list[Message]) -> None:
    """Send a request; ``sent`` gets the messages of the answer."""
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"spec_version": "2.3"},
        "method": "POST",
        "path": "/",
        "headers": [],
        "query_string": b"",
    }
    requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # no client disconnects
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)


def body_of(sent: list[Message]) -> str:
    return b"".join(message.get("body", b"") for message in sent).decode()


def stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Mark": "1"})


def test_a_stream_begins_with_its_first_event() -> None:
    async def run() -> None:
        first, second = asyncio.Event(), asyncio.Event()

        async def events() -> AsyncIterator[str]:
            await first.wait()
            yield EVENTS[0]
            await second.wait()
            yield EVENTS[1]

        sent: list[Message] = []
        request = asyncio.create_task(call(app_answering(stream(events())), sent))
        await asyncio.sleep(0.05)
        assert sent == []
        first.set()
        await asyncio.sleep(0.05)
        start, event = sent
        assert start["status"] == 200
        assert (b"x-mark", b"1") in start["headers"]
        assert event["body"].decode() == EVENTS[0]
        second.set()
        await request
        assert body_of(sent) == "".join(EVENTS)
        assert sent[-1]["more_body"] is False

    asyncio.run(run())


def test_a_stream_whose_engine_died_before_is_answered_with_503() -> None:
    async def events() -> AsyncIterator[str]:
        yield 'data: {"error": "dead"}\n\n'
        yield EVENTS[1]

    sent: list[Message] = []
    asyncio.run(call(app_answering(stream(events()), is_dead=True), sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert "the engine died" in body_of(sent)


@pytest.mark.parametrize("is_stopping", [False, True])
@pytest.mark.parametrize(
    "event", ['data: {"error": {"code": 503}}\n\n', "event: error\ndata: {}\n\n"]
)
def test_a_stream_that_a_stopping_server_refuses_is_answered_with_503(
    event: str, is_stopping: bool
) -> None:
    async def events() -> AsyncIterator[str]:
        yield event
        yield EVENTS[1]

    app = app_answering(stream(events()))
    client = SimpleNamespace(shutdown=Mock(), generate=Mock())
    note_shutdown(client, app.state)
    if is_stopping:
        client.shutdown()
    sent: list[Message] = []
    asyncio.run(call(app, sent))
    if is_stopping:
        assert sent[0]["status"] == 503
        assert "shutting down" in body_of(sent)
    else:
        assert sent[0]["status"] == 200
        assert body_of(sent) == event + EVENTS[1]


def test_an_engine_that_dies_later_leaves_the_stream_as_it_is() -> None:
    async def events() -> AsyncIterator[str]:
        yield EVENTS[0]
        app.state.engine_client.errored = True
        yield EVENTS[1]

    app = app_answering(stream(events()))
    sent: list[Message] = []
    asyncio.run(call(app, sent))
    assert sent[0]["status"] == 200
    assert body_of(sent) == "".join(EVENTS)


@pytest.mark.parametrize("is_dead", [False, True])
def test_other_answers_pass(is_dead: bool) -> None:
    sent: list[Message] = []
    asyncio.run(call(app_answering(JSONResponse({"a": 1}), is_dead=is_dead), sent))
    assert sent[0]["status"] == 200
    assert body_of(sent) == '{"a":1}'
