"""A server without a model: an image's colour says from which ratio on its answer changes.

So hundreds of images can be asked in a second, and the right ratio is known.
"""

import base64
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from vitcop_vllm.pruning.settings import RATIO_HEADER

REFUSED = 255
"""Blue of an image that the server refuses."""

TOKENS = 100
"""Visual tokens of an image."""


def save_image(path: Path, breaks: float, number: int = 0, blue: int = 0) -> None:
    """Write an image whose answer changes from the ratio ``breaks`` on.

    Args:
        breaks: In whole hundredths.
        number: Makes images different.
        blue: ``REFUSED``, or anything below.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1 + number % 50, 1 + number // 50), (round(100 * breaks), 0, blue)).save(path)


def save_images(folder: Path, breaks: Sequence[float]) -> Path:
    for number, ratio in enumerate(breaks):
        save_image(folder / f"{number}.png", ratio, number)
    return folder


@dataclass
class RuleServer:
    """Rules that a test may change, and the requests that came.

    Attributes:
        settings: What ``/v1/pruning/config`` says; ``None`` for 404, as behind a gateway.
        largest: Ratios above are refused.
        has_plugin: Whether usage has visual tokens.
        sees_header: Whether the ratio arrives.
        scores: Whether it has prompt log-probabilities.
        space: Written before each answer and by the chat template, like LLaMA's tokenizer.
        fails_from: Number of the request from which it answers 500.
        requests: Ratio of each answer that was asked.
        scorings: Ratio of each answer that was scored.
    """

    settings: dict[str, Any] | None = field(default_factory=lambda: {"max_pruning_ratio": 0.95})
    largest: float = 0.95
    has_plugin: bool = True
    sees_header: bool = True
    scores: bool = True
    space: str = ""
    fails_from: int | None = None
    requests: list[float] = field(default_factory=list)
    scorings: list[float] = field(default_factory=list)
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Any:
            return {"object": "list", "data": [{"id": "rules", "object": "model"}]}

        @app.get("/v1/pruning/config")
        def config() -> Any:
            if self.settings is None:
                return error(404, "no such route")
            return {"settings": self.settings}

        @app.post("/v1/chat/completions")
        async def chat(raw_request: Request) -> Any:
            ratio = float(raw_request.headers[RATIO_HEADER]) if self.sees_header else 0.0
            return self.answer(await raw_request.json(), ratio)

        return app

    def answer(self, body: dict[str, Any], ratio: float) -> Any:
        if ratio > self.largest:
            return error(400, f"{RATIO_HEADER} must be at most {self.largest}")
        messages = body["messages"]
        scored = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if scored is not None and not self.scores:
            return error(400, "prompt_logprobs is not supported")
        asked = self.requests if scored is None else self.scorings
        asked.append(ratio)
        if self.fails_from is not None and len(self.requests) > self.fails_from:
            return error(500, "out of order")
        url = messages[0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        red, _, blue = image.getpixel((0, 0))  # type: ignore[misc]
        if blue == REFUSED:
            return error(400, "the image is too blue")
        is_same = ratio < red / 100
        history = "".join(m["content"] for m in messages if isinstance(m["content"], str))
        question = messages[-1]["content"][-1]["text"]
        text = f"{question} after {history or 'nothing'}" if is_same else "no"
        tokens = [*map(ord, self.space + text), 0]
        kept = round(TOKENS * (1 - ratio))
        visual = {"encoder": TOKENS, "stages": [kept] * 3}
        usage = {"prompt_tokens": kept + 10, "completion_tokens": 1, "total_tokens": 1}
        if self.has_plugin:
            usage |= {"visual_tokens": visual, "pruning_ratio": 1 - kept / TOKENS}  # type: ignore[dict-item]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        extra: dict[str, Any] = {}
        if scored is None:
            choice["message"] = {"role": "assistant", "content": self.space + text}
            choice["token_ids"] = tokens if body.get("return_token_ids") else None
        else:
            assert body["continue_final_message"]
            assert not body["add_generation_prompt"]
            choice["message"] = {"role": "assistant", "content": ""}
            ids = [*map(ord, self.space + scored)]
            usage["prompt_tokens"] += len(ids)
            value = -0.1 if is_same else -3.0
            entries = [{str(token): {"logprob": value, "rank": 1}} for token in ids]
            extra["prompt_logprobs"] = [None, *[{"7": {"logprob": 0.0}}] * (kept + 9), *entries]
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "rules",
            "choices": [choice],
            "usage": usage,
            **extra,
        }


def error(status: int, message: str) -> JSONResponse:
    content = {"message": message, "type": "error", "param": None, "code": status}
    return JSONResponse({"error": content}, status)


@contextmanager
def serving(rules: RuleServer) -> Iterator[RuleServer]:
    """Serve ``rules`` on a free port."""
    options = uvicorn.Config(rules.app(), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    rules.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield rules
    finally:
        server.should_exit = True
        thread.join()
