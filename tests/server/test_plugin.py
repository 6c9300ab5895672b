"""The endpoint plugin against vLLM's protocol."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from server.plugin import PruningEndpointPlugin
from server.serving import PrunedChat, PrunedCompletion
from vitcop_vllm.pruning.settings import PruningSettings


def init(*, trust: bool = True, **hf_config: Any) -> SimpleNamespace:
    state = SimpleNamespace(
        openai_serving_chat=OpenAIServingChat.__new__(OpenAIServingChat),
        openai_serving_completion=OpenAIServingCompletion.__new__(OpenAIServingCompletion),
    )
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["NewModel"], **hf_config),
        hf_text_config=SimpleNamespace(num_hidden_layers=8),
    )
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=model_config), shutdown=None, errored=False
    )
    args = SimpleNamespace(trust_request_mm_kwargs=trust)
    asyncio.run(PruningEndpointPlugin().init_state(engine, state, args))  # type: ignore[arg-type]
    return state


def test_speaks_the_protocol() -> None:
    assert isinstance(PruningEndpointPlugin(), EndpointPlugin)
    assert PruningEndpointPlugin.name == "vitcop"


def test_handlers_are_replaced() -> None:
    state = init(pruning=PruningSettings().model_dump(mode="json"))
    assert type(state.openai_serving_chat) is PrunedChat
    assert type(state.openai_serving_completion) is PrunedCompletion


def test_untrusted_keywords_stop_start_up() -> None:
    with pytest.raises(ValueError, match="--trust-request-mm-kwargs"):
        init(trust=False, pruning={})


def test_foreign_architecture_stops_start_up() -> None:
    with pytest.raises(ValueError, match="NewModel"):
        init()
