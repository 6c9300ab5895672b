"""A client that sends any body, and checks of the answers."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer key"}
MAX_BODY = 2 * 2**20


class Server:
    """One connection to a server that must survive every request."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        limits = httpx.Limits(max_connections=1)
        self.http = httpx.Client(base_url=url, timeout=60, limits=limits, headers=headers)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def chat(self, **fields: Any) -> httpx.Response:
        """Send a short chat request with ``fields``, which may hold any JSON."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}]}
        return self.post(CHAT, json.dumps({**body, "max_tokens": 1, **fields}))

    def post(self, path: str, content: Any, kind: str = "application/json") -> httpx.Response:
        return self.http.post(path, content=content, headers={"content-type": kind})

    @contextmanager
    def stays_usable(self) -> Iterator[None]:
        """Check that the server and the connection are still usable at the end."""
        before = local_port(self.chat())
        yield
        good = self.chat()
        assert good.status_code == 200, good.text
        assert local_port(good) == before
        assert self.http.get("/health").status_code == 200


def kept_places(stage: Mapping[str, Any], num_tokens: int) -> set[int]:
    """Visual tokens that a Stage of an explanation keeps, of ``num_tokens``."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["kept"]), dtype=np.uint8))
    return set(np.flatnonzero(bits[:num_tokens]).tolist())


def metrics(http: httpx.Client) -> dict[str, float]:
    """Metrics of pruning, by name and labels."""
    lines = http.get("/metrics").text.splitlines()
    return {
        name: float(value)
        for line in lines
        if (found := re.fullmatch(r"(vitcop_\S+) (\S+)", line))
        for name, value in [found.groups()]
    }


def local_port(answer: httpx.Response) -> int:
    return int(answer.extensions["network_stream"].get_extra_info("client_addr")[1])


def assert_refused(answer: httpx.Response, status: int = 400, words: str = "") -> None:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert words in error["message"]
    assert len(error["message"]) < 5000


def one_image(url: object, **fields: object) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}, **fields}
    return [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]


def part(**fields: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [fields]}]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
