"""Usage reports prompt tokens that were read from and written to the prefix cache."""

from typing import Any

import httpx
import pytest

from tests.server.sample_images import png_url

pytestmark = pytest.mark.slow

HEADER = "X-Pruning-Ratio"

TURNS = [("What is this?", 8401), ("How many are there?", 8402, 8403), ("And here?", 8401)]
"""Turns of a conversation: a question, and the seeds of its images."""


def chat(http: httpx.Client, body: dict[str, Any], ratio: str) -> tuple[int, int, int]:
    """Prompt tokens: total, read and written."""
    answer = http.post("/v1/chat/completions", json=body, headers={HEADER: ratio}).json()
    details = answer["usage"]["prompt_tokens_details"]
    return (
        answer["usage"]["prompt_tokens"],
        details["cached_tokens"],
        details["created_cache_tokens"],
    )


def messages(http: httpx.Client, body: dict[str, Any], ratio: str) -> tuple[int, int, int]:
    usage = http.post("/v1/messages", json=body, headers={HEADER: ratio}).json()["usage"]
    read, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    return usage["input_tokens"] + read + written, read, written


def openai_image(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_url(seed)}}


def anthropic_image(seed: int) -> dict[str, Any]:
    _, data = png_url(seed).split(",")
    return {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data},
    }


@pytest.mark.parametrize("ratio", ["0", "0.3", "0.889"])
@pytest.mark.parametrize(("ask", "image"), [(chat, openai_image), (messages, anthropic_image)])
def test_a_repeated_request_reads_all_cached_tokens(
    http: httpx.Client, model: str, ask: Any, image: Any, ratio: str
) -> None:
    history: list[dict[str, Any]] = []
    written = 0
    for question, *seeds in TURNS:
        text = {"type": "text", "text": question}
        parts = [*map(image, seeds), text]
        if not history:  # tests must not share a prefix
            parts.insert(0, {"type": "text", "text": f"{ask.__name__} at {ratio}: "})
        history.append({"role": "user", "content": parts})
        body = {"model": model, "messages": history, "max_tokens": 2, "temperature": 0}
        (total, *first), (_, *again) = (ask(http, body, ratio) for _ in range(2))
        assert first[0] >= written
        written = sum(first)
        assert 0 < written < total
        assert again == [written, 0]
        history.append({"role": "assistant", "content": "Yes."})
