"""The page and its real routes, for a model without weights whose grid follows the image."""

import json
import random
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tests.server.grids import grid_preview
from vitcop_server import routes
from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.frame import load_image
from vitcop_server.middleware import EXPLAIN_STATE_KEY
from vitcop_server.page import attach_page
from vitcop_server.settings import ServerSettings
from vitcop_vllm.pruning.amount import FixedRatio
from vitcop_vllm.pruning.identity import explained_identifier, tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import RATIO_HEADER

MEDIA = SimpleNamespace(
    get_multimodal_config=lambda: SimpleNamespace(media_io_kwargs={}),
    allowed_local_media_path="",
    allowed_media_domains=None,
)


class Answer:
    """Replaces vLLM's answer in an explanation."""

    def model_dump(self) -> dict[str, Any]:
        return {}


class Model:
    """Answers every question with one word, and selects tokens at random.

    Attributes:
        preview: Plans of the model.
        records: Selections by the image's identifier.
    """

    def __init__(self, **settings: Any) -> None:
        self.preview = grid_preview(**settings)
        self.records: dict[str, Any] = {}

    async def create_chat_completion(self, request: Any, raw_request: Request) -> Answer:
        (message,) = request.messages
        part = next(part for part in message["content"] if part["type"] != "text")
        name = await self.record(part, raw_request)
        getattr(raw_request.state, EXPLAIN_STATE_KEY).identifiers.append(name)
        return Answer()

    async def record(self, part: Mapping[str, Any], raw_request: Request) -> str:
        """Identifier of the image, whose selections are recorded."""
        counts, size = await self.counts(part["image_url"]["url"], raw_request)
        name = explained_identifier("request", 0, size, tag_identifier("abc", counts))
        self.records[name] = choose(counts)
        return name

    async def collective_rpc(self, method: str, args: tuple[list[str]]) -> list[Any]:
        return [{name: self.records.pop(name) for name in args[0]}]

    async def usage(self, part: Mapping[str, Any], raw_request: Request) -> dict[str, Any]:
        counts, _ = await self.counts(part["image_url"]["url"], raw_request)
        return self.preview.model.usage_fields([counts])

    async def stream(
        self, part: Mapping[str, Any], raw_request: Request
    ) -> AsyncGenerator[str, None]:
        for chunk in (
            {"choices": [{"delta": {"content": "Grid"}}]},
            {"choices": [], "usage": await self.usage(part, raw_request)},
        ):
            yield f"data: {json.dumps(chunk)}\n\n"

    async def counts(
        self, url: str, raw_request: Request
    ) -> tuple[VisualTokenCounts, tuple[int, int]]:
        size = (await load_image(url, MEDIA)).size
        return self.preview.counts(
            *size, FixedRatio(float(raw_request.headers[RATIO_HEADER]))
        ), size


def choose(counts: VisualTokenCounts, seed: int = 1) -> dict[str, Any]:
    """A random worker's record: kept tokens, and merged groups of neighbours."""
    if not counts.is_pruned:
        return {}
    rng = random.Random(seed)
    n1, n2, n3 = counts.stages
    groups = max(1, min(counts.centres // 2, n2 - 1, (n1 - n2) // 2))
    rows = list(range(n1))
    merged_at = sorted(rng.sample(rows, min(n1 - n2 + groups, 4 * groups)))
    merged = [
        merged_at[i * len(merged_at) // groups : (i + 1) * len(merged_at) // groups]
        for i in range(groups)
    ]
    alone = sorted(rng.sample(sorted(set(rows) - set(merged_at)), n2 - groups))
    shallow = sorted([*alone, *(group[0] for group in merged)])
    return {
        "patches": sorted(rng.sample(range(counts.encoder), n1)),
        "saliency": [rng.random() for _ in range(counts.encoder)],
        "shallow": shallow,
        "merged": merged,
        "deep": sorted(rng.sample(range(n2), n3)),
    }


def grid_app(
    *, has_cls: bool = False, tiled: bool = False, coarse_last: bool = False, **settings: Any
) -> FastAPI:
    """An application with page, routes and answers; the encoder may have [CLS], or tiles."""
    model = Model(**settings)
    info = model.preview.info
    info.reads_cls, info.tiled, info.coarse_last = has_cls, tiled, coarse_last
    return app_of(model)


def app_of(model: Model) -> FastAPI:
    """An application with page, routes and the answers of ``model``."""
    app = FastAPI()
    app.include_router(routes.router)
    attach_page(app)
    app.state.pruning_server_settings = ServerSettings(explain=True)
    app.state.pruning_preview = model.preview
    app.state.pruning_default_ratio = DefaultRatio(model.preview.model.settings)
    app.state.openai_serving_chat = app.state.engine_client = model
    app.state.vllm_config = SimpleNamespace(
        model_config=MEDIA, cache_config=SimpleNamespace(enable_prefix_caching=True)
    )

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any], raw_request: Request) -> StreamingResponse:
        part = body["messages"][0]["content"][0]
        return StreamingResponse(model.stream(part, raw_request), media_type="text/event-stream")

    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Base URL of ``app`` on a free port, served by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
