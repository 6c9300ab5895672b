"""The endpoint plugin against vLLM's protocol."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from tests.server.handlers import bare_handler
from vitcop_server.aliases import AliasedModels
from vitcop_server.plugin import PruningEndpointPlugin
from vitcop_server.serving import (
    PrunedChat,
    PrunedChatBatch,
    PrunedCompletion,
    PrunedMessages,
    PrunedResponses,
)
from vitcop_server.tokenization import PrunedTokenization
from vitcop_vllm.pruning.settings import PruningSettings


def init(*, server: dict[str, Any] | None = None, **hf_config: Any) -> SimpleNamespace:
    state = SimpleNamespace(
        openai_serving_chat=bare_handler(OpenAIServingChat),
        openai_serving_chat_batch=bare_handler(OpenAIServingChatBatch),
        openai_serving_completion=bare_handler(OpenAIServingCompletion),
        openai_serving_responses=bare_handler(OpenAIServingResponses),
        anthropic_serving_messages=bare_handler(AnthropicServingMessages),
        serving_tokenization=bare_handler(ServingTokenization),
        openai_serving_models=OpenAIServingModels.__new__(OpenAIServingModels),
    )
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["NewModel"], **hf_config),
        hf_text_config=SimpleNamespace(num_hidden_layers=8),
        get_num_kv_heads=lambda parallel: 2,
        get_head_size=lambda: 16,
        dtype="torch.bfloat16",
    )
    vllm_config = SimpleNamespace(
        model_config=model_config,
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        observability_config=SimpleNamespace(otlp_traces_endpoint=None),
    )
    engine = SimpleNamespace(
        vllm_config=vllm_config,
        renderer=SimpleNamespace(
            mm_processor=SimpleNamespace(info=SimpleNamespace(allowed_mm_limits={"image": 1})),
            mm_processor_cache=None,
        ),
        shutdown=None,
        generate=None,
        errored=False,
    )
    args = SimpleNamespace(
        served_model_name=None,
        model="some/model",
        additional_config={"server": server or {}},
    )
    asyncio.run(PruningEndpointPlugin().init_state(engine, state, args))  # type: ignore[arg-type]
    return state


def test_it_implements_the_protocol() -> None:
    assert isinstance(PruningEndpointPlugin(), EndpointPlugin)
    assert PruningEndpointPlugin.name == "vitcop"


def test_handlers_are_replaced() -> None:
    state = init(pruning=PruningSettings().model_dump(mode="json"))
    assert type(state.openai_serving_chat) is PrunedChat
    assert type(state.openai_serving_chat_batch) is PrunedChatBatch
    assert type(state.openai_serving_completion) is PrunedCompletion
    assert type(state.openai_serving_responses) is PrunedResponses
    assert type(state.anthropic_serving_messages) is PrunedMessages
    assert type(state.serving_tokenization) is PrunedTokenization
    assert type(state.openai_serving_models) is AliasedModels
    assert state.openai_serving_chat.pruned_model.names == ("some/model",)


def test_server_settings_are_applied() -> None:
    pruning = PruningSettings().model_dump(mode="json")
    state = init(pruning=pruning, server={"explain": True, "aliases": [0.5]})
    assert state.pruning_server_settings.explain
    assert state.openai_serving_models.aliases == (0.5,)
    # Keys and values, of two devices with two heads each, in two bytes.
    assert state.pruning_preview.kv_bytes == 2 * 2 * 2 * 16 * 2
    with pytest.raises(ValueError, match=r"server.*'explian'.*'explain'"):
        init(pruning=pruning, server={"explian": True})


def test_an_unknown_architecture_stops_start_up() -> None:
    with pytest.raises(ValueError, match="NewModel"):
        init()


@pytest.mark.usefixtures("media_of_the_process")
@pytest.mark.parametrize("folder", [None, "/somewhere"])
def test_missing_metrics_are_logged(
    folder: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if folder is not None:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", folder)
    app = FastAPI()
    app.state.args = SimpleNamespace(additional_config={}, middleware=[])
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING", logger="vllm"):
        PruningEndpointPlugin().attach_router(app)
    assert ("PROMETHEUS_MULTIPROC_DIR" in caplog.text) == (folder is None)
