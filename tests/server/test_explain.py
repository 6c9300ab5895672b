"""Explanations whose selections are lost in the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vitcop_server import explain, routes
from vitcop_server.middleware import EXPLAIN_STATE_KEY
from vitcop_vllm.pruning.identity import explained_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts

PRUNED = VisualTokenCounts(16, 2, (8, 4, 2))
NAME = explained_identifier("request", 0, (64, 48), f"abc@{PRUNED.encode()}")


class Answer:
    """Replaces vLLM's chat handler and its answer."""

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        getattr(raw_request.state, EXPLAIN_STATE_KEY).identifiers.append(NAME)
        return self

    def model_dump(self) -> dict[str, Any]:
        return {}


class Engine:
    async def collective_rpc(self, method: str, args: Any) -> list[dict[str, Any]]:
        return [{}]


def test_a_lost_explanation_is_a_503() -> None:
    app = FastAPI()
    app.include_router(routes.router)
    app.state.pruning_server_settings = SimpleNamespace(explain=True)
    app.state.openai_serving_chat, app.state.engine_client = Answer(), Engine()
    app.state.pruning_preview = None
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    with TestClient(app) as client:
        answer = client.post("/v1/pruning/explain", json=body)
    assert answer.status_code == 503
    assert "256" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"patches": range(8)},
        {"deep": [0, 1]},  # the record of the first stages was evicted
        {"patches": range(8), "shallow": [0, 1, 2, 3]},
    ],
)
def test_a_partial_record_is_lost(record: dict[str, Any]) -> None:
    with pytest.raises(explain.LostSelectionsError):
        explain.explain_image(None, NAME, {NAME: record})  # type: ignore[arg-type]
