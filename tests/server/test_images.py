"""Images as real clients send them, on each route with images."""

import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.server.clients import CHAT, Server, one_image
from tests.server.test_media import data_url, encoded

pytestmark = pytest.mark.slow

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8).repeat(8, axis=0)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
ROUTES = [CHAT, "/v1/responses", "/v1/messages"]


def ask(server: Server, route: str, url: str) -> httpx.Response:
    """Ask about an image in the route's own body; Anthropic's has base64 without a prefix."""
    body: dict[str, Any] = {"model": server.model, "max_tokens": 1}
    content: list[dict[str, Any]]
    if route == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
        content = [{"type": "image", "source": source}, {"type": "text", "text": "Hi"}]
        body["messages"] = [{"role": "user", "content": content}]
    elif route == "/v1/responses":
        content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Hi"}]
        body = {"model": server.model, "max_output_tokens": 1}
        body["input"] = [{"role": "user", "content": content}]
    else:
        body["messages"] = one_image(url)
    return server.post(route, json.dumps(body))


@pytest.mark.parametrize("route", ROUTES)
def test_wrapped_base64_without_padding_is_read(server: Server, route: str) -> None:
    header, _, text = data_url(encoded(Image.fromarray(GREY)) + b"\0").partition(",")
    lines = [text[at : at + 76] for at in range(0, len(text), 76)]
    url = header.replace("base64", " BASE64") + ",\r\n" + "\r\n".join(lines).rstrip("=")
    answer = ask(server, route, url)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("url", "words"),
    [
        (data_url(HEIC), "is HEIC, which cannot be read; formats that can be read include"),
        (data_url(b""), "the image is empty"),
        ("data:image/png;base64," + data_url(HEIC), "start with a second prefix"),
        ("data:image/png;base64,abc_", "'_' after 3 digits"),
    ],
)
def test_the_error_names_the_fault(server: Server, route: str, url: str, words: str) -> None:
    with server.stays_usable():
        answer = ask(server, route, url)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_16_bits_look_like_8_bits_to_the_model(server: Server) -> None:
    def first_logprobs(image: Image.Image) -> Any:
        messages = one_image(data_url(encoded(image)))
        answer = server.chat(messages=messages, logprobs=True, top_logprobs=5, temperature=0)
        return answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    seen = first_logprobs(Image.fromarray(GREY))
    assert first_logprobs(Image.fromarray(GREY.astype(np.uint16) * 257)) == seen
    assert first_logprobs(Image.new("L", (8, 64), "white")) != seen
