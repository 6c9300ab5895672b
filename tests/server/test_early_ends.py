"""A request that ends early, or waits, never makes a good request fail.

The server's image cache has room for a few images, so it is full in most of these tests.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

import httpx
import pytest

from tests.server.process import IMAGE_ROOM
from tests.server.sample_images import chat_body, image_message, png_url

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
new_seeds = count(90_000)


def ask(http: httpx.Client, model: str, *seeds: int, **fields: Any) -> httpx.Response:
    body = chat_body(model, *seeds, **{"max_tokens": 2, **fields})
    return http.post(CHAT, json=body)


def stray_image_token(http: httpx.Client, model: str, seed: int) -> None:
    messages = [image_message(seed, text="What is <image>?")]
    assert ask(http, model, messages=messages).status_code == 400


def wrong_schema(http: httpx.Client, model: str, seed: int) -> None:
    """vLLM refuses it last, after all other checks."""
    schema = {"name": "x", "schema": {"type": "nonsense"}}
    wrong = {"type": "json_schema", "json_schema": schema}
    assert ask(http, model, seed, response_format=wrong).status_code == 400


def too_long(http: httpx.Client, model: str, seed: int) -> None:
    messages = [image_message(seed, text="x " * 4000)]
    assert ask(http, model, messages=messages).status_code == 400


def half_a_batch(http: httpx.Client, model: str, seed: int) -> None:
    conversations = [[image_message(seed)], [{"role": "user", "content": "<image>"}]]
    body = {"model": model, "messages": conversations}
    assert http.post(f"{CHAT}/batch", json=body).status_code == 400


def counted(http: httpx.Client, model: str, seed: int) -> None:
    data = png_url(seed).partition(",")[2]
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    assert http.post("/v1/messages/count_tokens", json=body).status_code == 200


def unsendable(http: httpx.Client, model: str, seed: int) -> None:
    """Half a surrogate pair cannot be encoded for the engine."""
    body = json.dumps(chat_body(model, seed, max_tokens=2, stop=["\ud800"]))
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text


def vanished(http: httpx.Client, model: str, seed: int) -> None:
    with suppress(httpx.TimeoutException):
        ask(httpx.Client(base_url=http.base_url, timeout=0.03), model, seed, max_tokens=100)


EARLY_ENDS = [
    stray_image_token,
    wrong_schema,
    too_long,
    half_a_batch,
    counted,
    unsendable,
    vanished,
]


@pytest.mark.parametrize("end", EARLY_ENDS)
def test_images_are_usable_after_a_request_that_ends_early(
    http: httpx.Client, model: str, end: Callable[[httpx.Client, str, int], None]
) -> None:
    for number in (IMAGE_ROOM - 1, IMAGE_ROOM, IMAGE_ROOM + 1):
        first, *_, last = seeds = [next(new_seeds) for _ in range(number)]
        for seed in seeds:
            assert ask(http, model, seed).status_code == 200
        end(http, model, last)
        end(http, model, next(new_seeds))
        for seed in (last, next(new_seeds), first):
            answer = ask(http, model, seed)
            assert answer.status_code == 200, answer.text


def test_an_image_is_usable_while_a_batch_with_it_is_prepared(
    http: httpx.Client, model: str
) -> None:
    def batch(seed: int) -> httpx.Response:
        seeds = [seed, *(next(new_seeds) for _ in range(7))]
        conversations = [[image_message(s)] for s in seeds]
        body = {"model": model, "messages": conversations, "max_tokens": 2}
        return http.post(f"{CHAT}/batch", json=body)

    with ThreadPoolExecutor(8) as clients:
        for _ in range(10):
            seed = next(new_seeds)
            jobs = [clients.submit(batch, seed)]
            jobs += [clients.submit(ask, http, model, seed) for _ in range(7)]
            assert {job.result().status_code for job in jobs} == {200}


def test_a_request_may_have_more_images_than_fit(http: httpx.Client, model: str) -> None:
    """The last image is cached until the others evict it."""
    seed = next(new_seeds)
    assert ask(http, model, seed).status_code == 200
    many = [next(new_seeds) for _ in range(IMAGE_ROOM)]
    for _ in range(2):
        answer = ask(http, model, *many, seed)
        assert answer.status_code == 200, answer.text
