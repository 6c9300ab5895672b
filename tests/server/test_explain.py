"""Explanations that get lost between the engine and the one who asked."""

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
    """Of vLLM's chat handler, as far as an explanation looks into it."""

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        getattr(raw_request.state, EXPLAIN_STATE_KEY).identifiers.append(NAME)
        return self

    def model_dump(self) -> dict[str, Any]:
        return {}


class Engine:
    async def collective_rpc(self, method: str, args: Any) -> list[dict[str, Any]]:
        return [{}]


def test_a_lost_explanation_is_no_fault_of_the_client() -> None:
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
        {"deep": [0, 1]},  # newer ones came between its stages
        {"patches": range(8), "shallow": [0, 1, 2, 3]},
    ],
)
def test_an_incomplete_record_is_an_error(record: dict[str, Any]) -> None:
    with pytest.raises(explain.LostSelectionsError):
        explain.explain_image(None, NAME, record)  # type: ignore[arg-type]
