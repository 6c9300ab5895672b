"""Images are fetched only from allowed hosts, and failing hosts do not block the server."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from tests.server.clients import MAX_BODY, Server, assert_refused, one_image
from tests.server.test_media import encoded

pytestmark = pytest.mark.slow


class Upstream(BaseHTTPRequestHandler):
    """A host of images; the path is the status of the answer."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path == "/silent":
            time.sleep(7)
        status = int(self.path[1:4]) if self.path[1:4].isdigit() else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/200")
        data = encoded(Image.new("RGB", (8, 8))) if status == 200 else b""
        if self.path == "/large":
            self.send_header("Content-Length", str(2 * MAX_BODY))
            data = bytes(2 * MAX_BODY)
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the server may disconnect early
            super().handle()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[tuple[str, list[str]]]:
    """The image host's address, and the fetched paths."""
    seen: list[str] = []
    handler = type("Handler", (Upstream,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_by_default_nothing_is_fetched(server: Server, upstream: tuple[str, list[str]]) -> None:
    url, seen = upstream
    with server.stays_usable():
        for host in (url, url.replace("127.0.0.1", "localhost"), url.replace("http", "HTTP")):
            assert_refused(server.chat(messages=one_image(f"{host}/200")), words="data URLs")
    assert seen == []


def test_images_are_fetched_only_from_an_allowed_host(
    guarded: Server, upstream: tuple[str, list[str]]
) -> None:
    url, seen = upstream
    assert guarded.chat(messages=one_image(f"{url}/200")).status_code == 200
    other = url.replace("127.0.0.1", "localhost")
    assert_refused(guarded.chat(messages=one_image(f"{other}/200")), words="allowed domains")
    assert seen == ["/200"]


def test_redirects_are_not_followed(guarded: Server, upstream: tuple[str, list[str]]) -> None:
    url, seen = upstream
    with guarded.stays_usable():
        assert_refused(guarded.chat(messages=one_image(f"{url}/302")))
    assert seen == ["/302"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/404", "404"),
        ("/500", "500"),
        ("/503", "503"),
        ("/silent", "TimeoutError"),
        ("/large", "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB=2"),
    ],
)
def test_a_failing_host_is_a_422(
    guarded: Server, upstream: tuple[str, list[str]], path: str, words: str
) -> None:
    with guarded.stays_usable():
        start = time.monotonic()
        assert_refused(guarded.chat(messages=one_image(upstream[0] + path)), 422, words)
        assert time.monotonic() - start < 30  # the client waits 60


def test_an_unreachable_host_is_a_422(guarded: Server) -> None:
    with socket.socket() as free, guarded.stays_usable():
        free.bind(("127.0.0.1", 0))
        start = time.monotonic()
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
        assert_refused(guarded.chat(messages=one_image(url)), 422, "cannot be fetched")
        assert time.monotonic() - start < 30  # the client waits 60
