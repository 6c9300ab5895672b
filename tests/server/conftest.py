"""Running servers, with one connection each."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import httpx
import pytest
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from tests.server.clients import KEY, MAX_BODY, Server
from tests.server.process import TINY_OPTIONS, running_server


@pytest.fixture
def media_of_the_process() -> Iterator[None]:
    """Restores what ``guard_media`` sets in the process: limits, connector and environment."""
    pixels, classes = Image.MAX_IMAGE_PIXELS, dict(MEDIA_CONNECTOR_REGISTRY.name2class)
    environ = dict(os.environ)
    with warnings.catch_warnings():
        yield
    Image.MAX_IMAGE_PIXELS = pixels
    MEDIA_CONNECTOR_REGISTRY.name2class = classes
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture(scope="session")
def server(server_url: str) -> Server:
    return Server(server_url, {})


@pytest.fixture(scope="package")
def guarded_process(checkpoint: Path) -> Iterator[tuple[str, Popen[bytes]]]:
    """A server with an API key, a small body limit, and one allowed image host."""
    limits = {"max_body_bytes": MAX_BODY, "max_image_pixels": 10_000, "image_ids": True}
    flags = ["--api-key", "key", "--enable-request-id-headers", "--server", json.dumps(limits)]
    media = ["--allowed-media-domains", "127.0.0.1", "--limit-mm-per-prompt", '{"image": 1}']
    queue = ["--max-num-seqs", "1", "--max-num-queued-reqs", "1"]
    with running_server(str(checkpoint), *TINY_OPTIONS, *flags, *media, *queue) as server:
        yield server


@pytest.fixture(scope="package")
def guarded(guarded_process: tuple[str, Popen[bytes]]) -> Server:
    return Server(guarded_process[0], KEY)


@pytest.fixture(scope="module")
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    """The served model's name."""
    return str(http.get("/v1/models").json()["data"][0]["id"])
