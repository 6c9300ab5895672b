"""vLLM's routes, request types and error handlers with handlers without an engine."""

import json
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.renderers.online_renderer import OnlineRenderer

from tests.server.handlers import bare_handler
from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.middleware import PruningMiddleware
from vitcop_server.serving import PrunedChat, PrunedCompletion
from vitcop_server.usage import PrunedModel
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

HEADER = "X-Pruning-Ratio"
COUNTS = VisualTokenCounts(576, 20, (172, 83, 17))
REPORT = {"encoder": 576, "stages": [172, 83, 17]}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": "Hi"},
}


class Stock:
    """Replaces vLLM's methods, and records the keywords that reach the processor."""

    def __init__(self) -> None:
        self.processor_kwargs: list[Any] = []
        self.closed_streams = 0

    def render(self, request: Any) -> list[dict[str, Any]]:
        self.processor_kwargs.append(request.mm_processor_kwargs)
        if getattr(request, "user", None) == "bad image":
            raise ValueError("cannot read image")
        with_image = getattr(request, "user", None) == "image"
        hashes = {"image": [f"abc@{COUNTS.encode()}"]} if with_image else {}
        tokens = [1, 3] if getattr(request, "user", None) == "mark" else [1]
        return [{"type": "multimodal", "prompt_token_ids": tokens, "mm_hashes": hashes}]

    async def events(self, usage: str) -> AsyncGenerator[str, None]:
        try:
            yield 'data: {"choices":[{"index":0}]}\n\n'
            yield f'data: {{"choices":[],"usage":{usage}}}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            self.closed_streams += 1


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Stock:
    stock = Stock()
    usage = UsageInfo(prompt_tokens=3, total_tokens=4, completion_tokens=1)

    async def preprocess_chat(self: Any, request: Any) -> Any:
        return [], stock.render(request)

    async def preprocess_completion(self: Any, request: Any) -> Any:
        return stock.render(request)

    async def create_chat(self: Any, request: Any, raw_request: Any = None) -> Any:
        await self.online_renderer.preprocess_chat(request)
        if request.stream:
            return stock.events(usage.model_dump_json())
        return ChatCompletionResponse(model="m", choices=[], usage=usage.model_copy())

    async def create_completion(self: Any, request: Any, raw_request: Any = None) -> Any:
        await self.online_renderer.preprocess_completion(request)
        if request.stream:
            return stock.events(usage.model_dump_json())
        return CompletionResponse(model="m", choices=[], usage=usage.model_copy())

    monkeypatch.setattr(OnlineRenderer, "preprocess_chat", preprocess_chat)
    monkeypatch.setattr(OnlineRenderer, "preprocess_completion", preprocess_completion)
    monkeypatch.setattr(OpenAIServingChat, "create_chat_completion", create_chat)
    monkeypatch.setattr(OpenAIServingCompletion, "create_completion", create_completion)
    return stock


@pytest.fixture
def client(stock: Stock) -> Iterator[TestClient]:
    model = PrunedModel(PruningSettings(default_ratio=0.25), num_layers=32)
    default = DefaultRatio(model.settings)
    app = FastAPI()
    chat_router.attach_router(app)
    completion_router.attach_router(app)
    init_exception_handler(app)
    app.add_middleware(PruningMiddleware)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.openai_serving_chat = PrunedChat.adopt(
        bare_handler(OpenAIServingChat), model, default
    )
    app.state.openai_serving_completion = PrunedCompletion.adopt(
        bare_handler(OpenAIServingCompletion), model, default
    )
    with TestClient(app) as client:
        yield client


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ratio_reaches_the_processor(client: TestClient, stock: Stock, route: str) -> None:
    answer = client.post(route, json=ROUTES[route], headers={HEADER: "0.50"})
    assert answer.headers[HEADER] == "0.5"
    client.post(route, json=ROUTES[route] | {"pruning_ratio": 0})
    client.post(route, json=ROUTES[route])
    assert stock.processor_kwargs == [{"pruning_ratio": ratio} for ratio in (0.5, 0.0, 0.25)]


def test_usage_reports_the_rendered_image(client: TestClient, route: str) -> None:
    usage = client.post(route, json=ROUTES[route] | {"user": "image"}).json()["usage"]
    assert usage["visual_tokens"] == REPORT
    assert usage["pruning_ratio"] == pytest.approx(0.882, abs=1e-3)
    assert usage["prompt_tokens"] == 3


def test_usage_of_text_is_null(client: TestClient, route: str) -> None:
    answer = client.post(route, json=ROUTES[route], headers={HEADER: "0.5"})
    assert answer.json()["usage"]["pruning_ratio"] is None
    assert answer.json()["usage"]["visual_tokens"] is None


def test_one_request_does_not_see_the_images_of_another(client: TestClient, route: str) -> None:
    for _ in range(2):
        answer = client.post(route, json=ROUTES[route] | {"user": "image"})
        assert answer.json()["usage"]["visual_tokens"] == REPORT


def test_a_stream_reports_usage_and_is_closed(client: TestClient, stock: Stock, route: str) -> None:
    body = ROUTES[route] | {"user": "image", "stream": True}
    answer = client.post(route, json=body, headers={HEADER: "0.5"})
    assert answer.headers[HEADER] == "0.5"
    first, last, done = answer.text.rstrip().split("\n\n")
    assert first == 'data: {"choices":[{"index":0}]}'
    assert json.loads(last.removeprefix("data: "))["usage"]["visual_tokens"] == REPORT
    assert done == "data: [DONE]"
    assert stock.closed_streams == 1


@pytest.mark.parametrize(
    ("headers", "fields", "param"),
    [
        ([("X-Pruning-Ratio", "2")], {}, HEADER),
        ([("x-pruning-ratio", "0.5"), ("X-PRUNING-RATIO", "0.5")], {}, HEADER),
        ([], {"pruning_ratio": "x"}, "pruning_ratio"),
        ([("X-Pruning-Ratio", "0.5")], {"pruning_ratio": 0.6}, "pruning_ratio"),
        ([], {"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ([], {"media_io_kwargs": {"image": {}}}, "media_io_kwargs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_ratios_and_keywords_are_refused(
    client: TestClient,
    stock: Stock,
    route: str,
    headers: list[tuple[str, str]],
    fields: dict[str, Any],
    param: str,
    stream: bool,
) -> None:
    answer = client.post(route, json=ROUTES[route] | fields | {"stream": stream}, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert HEADER not in answer.headers
    assert stock.processor_kwargs == []


def test_a_video_is_refused_before_a_fetch(client: TestClient, stock: Stock) -> None:
    part = {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/a.mp4"}}
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("BadRequestError", "messages")
    assert error["message"].startswith("videos are not accepted")
    assert stock.processor_kwargs == []


def test_a_stray_placeholder_is_named_by_the_model_s_tokenizer(
    client: TestClient, route: str
) -> None:
    handler = client.app.state.openai_serving_chat  # type: ignore[attr-defined]
    if route == "/v1/completions":
        handler = client.app.state.openai_serving_completion  # type: ignore[attr-defined]
    handler.online_renderer.renderer.tokenizer = SimpleNamespace(decode=lambda ids: f"<mark{ids}>")
    answer = client.post(route, json=ROUTES[route] | {"user": "mark"})
    assert answer.status_code == 400
    field = "prompt" if route == "/v1/completions" else "messages"
    assert answer.json()["error"]["param"] == field
    assert f"{field} contains <mark[3]>" in answer.json()["error"]["message"]


def test_an_error_of_the_processor_is_a_400(client: TestClient, route: str) -> None:
    answer = client.post(route, json=ROUTES[route] | {"user": "bad image"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "cannot read image"
    assert HEADER not in answer.headers


def test_adopting_does_not_change_the_original() -> None:
    original = bare_handler(OpenAIServingChat)
    original.response_role = "assistant"
    adopted = PrunedChat.adopt(
        original, PrunedModel(PruningSettings(), 32), DefaultRatio(PruningSettings())
    )
    assert type(original) is OpenAIServingChat
    assert isinstance(adopted, OpenAIServingChat)
    assert adopted.response_role == "assistant"
    assert type(original.online_renderer) is OnlineRenderer
    assert isinstance(adopted.online_renderer, OnlineRenderer)
