"""Random requests to the running server: no 5xx, and the server stays alive.

``FUZZ_EXAMPLES`` sets the number of bodies per route; the default is small, to save time.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.server.test_media import data_url, encoded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
# Long answers would take the time of many requests.
FEW = {"max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1, "n": 1}

GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    "/v1/chat/completions/batch": {"messages": [HELLO]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {"messages": HELLO},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/pruning/explain": {"messages": HELLO},
    "/v1/responses": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/generative_scoring": {"query": "Hi", "items": ["Hi"], "label_token_ids": [1]},
    "/invocations": {"messages": HELLO},
}
"""Inference routes, and the fields of a valid body for each."""

DISPATCHED = {"/invocations": CHAT}
"""A route without its own schema, and the route that it passes bodies on to."""

fuzzed = settings(
    deadline=None,
    database=None,
    # By default the requests are the same every time; a longer run has new ones.
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    # Shrinking takes long, and the failing answer is enough.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client
        assert client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def schema(http: httpx.Client) -> Any:
    return schemathesis.openapi.from_dict(http.get("/openapi.json").json())


def assert_harmless(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert '"code":5' not in answer.text


def post(http: httpx.Client, route: str, body: object) -> None:
    content = json.dumps(body, allow_nan=True)
    assert_harmless(http.post(route, content=content, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("route", GOOD)
def test_bodies_from_the_schema(http: httpx.Client, model: str, schema: Any, route: str) -> None:
    """Each body is sent as generated, which is rarely valid, and with valid fields added."""

    @settings(fuzzed, max_examples=EXAMPLES)
    @given(schema[DISPATCHED.get(route, route)]["POST"].as_strategy())
    def send(case: Any) -> None:
        body = (case.body if isinstance(case.body, dict) else {}) | FEW
        post(http, route, body)
        post(http, route, body | GOOD[route] | {"model": model})

    send()


SAMPLING = {
    **{name: st.floats(width=32) | st.integers() for name in ("temperature", "top_p", "min_p")},
    **{f"{name}_penalty": st.floats() for name in ("presence", "repetition", "length")},
    **{name: st.integers() for name in ("top_k", "seed", "min_tokens", "n", "top_logprobs")},
    "max_tokens": st.integers(max_value=3) | st.integers(min_value=10_000),
    "logit_bias": st.dictionaries(st.integers(-5, 300).map(str) | st.text(), st.floats()),
    "stop": st.text() | st.lists(st.text(alphabet=st.characters())),
    "stop_token_ids": st.lists(st.integers()),
    "bad_words": st.lists(st.text(alphabet=st.characters())),
    "allowed_token_ids": st.lists(st.integers(-1, 300)),
    "logprobs": st.booleans(),
    "stream": st.booleans(),
    "use_beam_search": st.booleans(),
    "user": st.text(alphabet=st.characters()),
}


def test_random_sampling_fields(http: httpx.Client, model: str) -> None:
    @settings(fuzzed, max_examples=4 * EXAMPLES)
    @given(st.fixed_dictionaries({}, optional=SAMPLING))
    def send(fields: dict[str, Any]) -> None:
        post(http, CHAT, {"model": model, "messages": HELLO, "max_tokens": 1, **fields})

    send()


NOT_HTTP = "Invalid HTTP request received."
"""Uvicorn's own answer, with status 400, to control characters in a header."""

header_bytes = st.binary(max_size=40).filter(lambda value: not set(value) & set(b"\0\r\n"))


@pytest.mark.parametrize(
    "name", ["X-Pruning-Ratio", "Content-Type", "Authorization", "X-Request-Id"]
)
def test_random_header_values(http: httpx.Client, model: str, name: str) -> None:
    body = json.dumps({"model": model, "messages": HELLO, "max_tokens": 1})
    digits = st.text("0123456789.,-+eE_ ", max_size=8).map(str.encode)

    @settings(fuzzed, max_examples=4 * EXAMPLES)
    @given(st.lists(header_bytes | digits, min_size=1, max_size=2))
    def send(values: list[bytes]) -> None:
        headers: list[tuple[bytes, bytes]] = [(name.encode(), value) for value in values]
        if name != "Content-Type":
            headers.append((b"Content-Type", b"application/json"))
        with suppress(httpx.LocalProtocolError):  # httpx refuses to send it
            answer = http.post(CHAT, content=body, headers=headers)
            if answer.text != NOT_HTTP:
                assert_harmless(answer)

    send()


NOISE = Image.effect_noise((24, 16), 90)
IMAGES = [
    encoded(NOISE.convert(mode), kind)
    for mode, kind in (
        ("RGB", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"),
        ("P", "GIF"), ("RGBA", "WEBP"), ("1", "TIFF"), ("RGB", "BMP"), ("RGBA", "ICO"),
    )
]  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 8), st.binary(max_size=8)), max_size=6
)


def mutated(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """``data`` with up to eight bytes at each position replaced, removed or added."""
    for start, length, new in changes:
        data = data[:start] + new + data[start + length :]
    return data


def test_mutated_images(http: httpx.Client, model: str) -> None:
    @settings(fuzzed, max_examples=8 * EXAMPLES)
    @given(st.sampled_from(IMAGES), edits, st.none() | st.integers(0, 500))
    def send(data: bytes, changes: list[tuple[int, int, bytes]], end: int | None) -> None:
        url = data_url(mutated(data, changes)[:end])
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        post(http, CHAT, {"model": model, "messages": [message], "max_tokens": 1})

    send()
