"""What requests get that the engine aborts, before and after shutdown has begun."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError

from vitcop_server.readiness import note_shutdown


def output(*token_ids: int, reason: str | None = None) -> Any:
    answer = SimpleNamespace(token_ids=list(token_ids), finish_reason=reason)
    return SimpleNamespace(outputs=[answer], finished=reason is not None)


REFUSED = [output(reason="abort")]
CUT_OFF = [output(1), output(reason="abort")]
COMPLETE = [output(1), output(2, reason="length")]
WITHOUT_TOKENS = [output(reason="stop")]


class Client:
    """An engine client that answers every request with the same outputs."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs
        self.closed = False

    def shutdown(self, timeout: float | None = None) -> None:
        pass

    async def generate(self, prompt: str, *, request_id: str) -> AsyncIterator[Any]:
        assert (prompt, request_id) == ("prompt", "1")
        try:
            for one in self.outputs:
                yield one
        finally:
            self.closed = True


async def answer(client: Any) -> list[Any]:
    return [one async for one in client.generate("prompt", request_id="1")]


@pytest.mark.parametrize("outputs", [REFUSED, CUT_OFF, COMPLETE, WITHOUT_TOKENS])
def test_a_running_server_passes_all_outputs(outputs: list[Any]) -> None:
    client = Client(outputs)
    note_shutdown(client, SimpleNamespace())
    assert asyncio.run(answer(client)) == outputs


@pytest.mark.parametrize("outputs", [CUT_OFF, COMPLETE, WITHOUT_TOKENS])
def test_a_stopping_server_passes_answers_that_began_or_ended(outputs: list[Any]) -> None:
    client = Client(outputs)
    note_shutdown(client, SimpleNamespace())
    client.shutdown()
    assert asyncio.run(answer(client)) == outputs


def test_a_stopping_server_raises_503_where_the_engine_refused() -> None:
    client = Client(REFUSED)
    note_shutdown(client, SimpleNamespace())
    client.shutdown()
    with pytest.raises(GracefulHTTPError, match="shutting down") as raised:
        asyncio.run(answer(client))
    assert raised.value.http_status == 503
    assert client.closed


def test_a_client_that_leaves_closes_the_engine_s_generator() -> None:
    async def leave(client: Any) -> None:
        outputs = client.generate("prompt", request_id="1")
        assert await anext(outputs) == COMPLETE[0]
        await outputs.aclose()

    client = Client(COMPLETE)
    note_shutdown(client, SimpleNamespace())
    asyncio.run(leave(client))
    assert client.closed
