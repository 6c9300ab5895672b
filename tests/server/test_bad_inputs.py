"""Whatever a client sends, it gets a 4xx in OpenAI's shape, and nobody else notices.

After each bad request a good one is answered on the same connection.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.pictures import picture_message, png_url
from tests.server.process import TINY_OPTIONS, engine_of, running_server
from tests.server.test_media import data_url, encoded, huge_png

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer key"}
MAX_BODY = 2 * 2**20
SURROGATE = "\ud800"
"""Half a character: valid in JSON, but no text."""


class Server:
    """One connection to a server that must survive whatever is sent."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        limits = httpx.Limits(max_connections=1)
        self.http = httpx.Client(base_url=url, timeout=60, limits=limits, headers=headers)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def chat(self, **fields: Any) -> httpx.Response:
        """A small answer to ``fields``, encoded as JSON that may hold anything."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}]}
        return self.post(CHAT, json.dumps({**body, "max_tokens": 1, **fields}))

    def post(self, path: str, content: Any, kind: str = "application/json") -> httpx.Response:
        return self.http.post(path, content=content, headers={"content-type": kind})

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Whatever happens inside leaves server and connection usable."""
        before = local_port(self.chat())
        yield
        good = self.chat()
        assert good.status_code == 200, good.text
        assert local_port(good) == before
        assert self.http.get("/health").status_code == 200


def local_port(answer: httpx.Response) -> int:
    return int(answer.extensions["network_stream"].get_extra_info("client_addr")[1])


def assert_refused(answer: httpx.Response, status: int = 400, words: str = "") -> None:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert words in error["message"]
    assert len(error["message"]) < 5000


@pytest.fixture(scope="module")
def server(server_url: str) -> Server:
    return Server(server_url, {})


@pytest.fixture(scope="module")
def guarded_process(checkpoint: Path) -> Iterator[tuple[str, Popen[bytes]]]:
    """A server with keys, a small body limit, and one host from which pictures are fetched."""
    limits = {"max_body_bytes": MAX_BODY, "max_picture_pixels": 10_000, "picture_ids": True}
    flags = ["--api-key", "key", "--enable-request-id-headers", "--server", json.dumps(limits)]
    media = ["--allowed-media-domains", "127.0.0.1", "--limit-mm-per-prompt", '{"image": 1}']
    queue = ["--max-num-seqs", "1", "--max-num-queued-reqs", "1"]
    with running_server(str(checkpoint), *TINY_OPTIONS, *flags, *media, *queue) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(guarded_process: tuple[str, Popen[bytes]]) -> Server:
    return Server(guarded_process[0], KEY)


def picture(url: object, **fields: object) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}, **fields}
    return [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]


def part(**fields: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [fields]}]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


JPEG = encoded(Image.new("RGB", (64, 64)), "JPEG")
FLAT = Image.new("1", (12_000, 12_000))

BAD_PICTURES = {
    "truncated base64": data_url(JPEG)[:-3],
    "bad base64": "data:image/png;base64,@@@@",
    "empty": data_url(b""),
    "text": data_url(b"hello"),
    "half a JPEG": data_url(JPEG[: len(JPEG) // 2]),
    "SVG": data_url(b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>'),
    "EPS": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    "PDF": data_url(b"%PDF-1.4\n"),
    "not base64": "data:image/png,abc",
    "no comma": "data:image/png",
    "bomb": data_url(huge_png(30_000, 30_000)),
    "large": data_url(encoded(FLAT)),
    "thin": data_url(encoded(Image.new("1", (8000, 1)))),
    "file": "file:///etc/hostname",
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "no host": "http://[::1",
    "other scheme": "ftp://127.0.0.1/a.png",
    "no URL": "",
    "null": None,
    "number": 5,
    "half a character": data_url(JPEG) + SURROGATE,
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(server: Server, name: str) -> None:
    with server.unharmed():
        start = time.monotonic()
        assert_refused(server.chat(messages=picture(BAD_PICTURES[name])))
        assert time.monotonic() - start < 3


def test_limits_of_pictures_are_named(server: Server) -> None:
    for name, limit in {"thin": "server.max_aspect_ratio", "large": "25000000"}.items():
        assert_refused(server.chat(messages=picture(BAD_PICTURES[name])), words=limit)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (1, 1))),
        encoded(Image.new("CMYK", (20, 20)), "JPEG"),
        encoded(Image.new("I;16", (20, 20))),
        encoded(Image.new("LA", (20, 20))),
        encoded(Image.new("RGBA", (20, 20))),
        encoded(Image.new("P", (9, 9)), "GIF", append_images=[Image.new("P", (9, 9), 3)]),
    ],
    ids=["1x1", "CMYK", "16 bit", "LA", "RGBA", "GIF"],
)
def test_odd_pictures_are_pictures(server: Server, data: bytes) -> None:
    answer = server.chat(messages=picture(data_url(data)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["visual_tokens"]["encoder"] == 256


BAD_PARTS: dict[str, list[dict[str, Any]]] = {
    "no picture": part(type="image_url"),
    "video": part(type="video_url", video_url={"url": "data:video/mp4;base64,AAAA"}),
    "audio": part(type="input_audio", input_audio={"data": "AAAA", "format": "wav"}),
    "audio URL": part(type="audio_url", audio_url={"url": "http://127.0.0.1:9/a"}),
    "image_embeds": part(type="image_embeds", image_embeds="AAAA"),
    "prompt_embeds": part(type="prompt_embeds", data="AAAA"),
    "Pillow": part(type="image_pil", image_pil="x"),
    "unknown": part(type="alien"),
    "uuid": picture(png_url(1), uuid="a"),
    "uuid alone": picture(None, uuid="a"),
    "uuid in short": part(image_url=png_url(1), uuid="a"),
    "long uuid": picture(png_url(1), uuid="a" * 5_000_000),
    "<image>": user("What is <image>?"),
    "600 <image>": user("<image>" * 600),
    "<image> before": [
        {"role": "user", "content": "See <image>"},
        {"role": "assistant", "content": "?"},
        picture_message(1),
    ],
    "<image> after": [picture_message(1, text="What is <image>?")],
    "too many": [picture_message(*range(9))],
    "20000 words": user("word " * 20_000),
    "half a character": user(SURROGATE),
    "role": [{"role": "alien", "content": "Hi"}],
    "no role": [{"content": "Hi"}],
    "none": [],
    "not a list": user([["Hi"]]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_messages(server: Server, name: str) -> None:
    with server.unharmed():
        assert_refused(server.chat(messages=BAD_PARTS[name]))


REFUSED_ONCE_READ = {"<image>": "What is <image>?", "long": "a " * 950}
"""Texts refused when the pictures beside them have been processed already."""


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", REFUSED_ONCE_READ)
def test_a_picture_of_a_refused_request(server: Server, name: str, is_stream: bool) -> None:
    seed = 1000 + 2 * list(REFUSED_ONCE_READ).index(name) + is_stream
    message = picture_message(seed, text=REFUSED_ONCE_READ[name])
    refused = server.chat(messages=[message], stream=is_stream)
    assert refused.status_code == 400 or '"code": 400' in refused.text, refused.text
    answer = server.chat(messages=[picture_message(seed)])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", REFUSED_ONCE_READ)
def test_a_picture_of_a_refused_response(server: Server, name: str, is_stream: bool) -> None:
    seed = 2000 + 2 * list(REFUSED_ONCE_READ).index(name) + is_stream
    content = [
        {"type": "input_image", "image_url": png_url(seed)},
        {"type": "input_text", "text": REFUSED_ONCE_READ[name]},
    ]
    item = {"role": "user", "content": content}
    body = {"model": server.model, "input": [item], "max_output_tokens": 1, "stream": is_stream}
    refused = server.post("/v1/responses", json.dumps(body))
    assert refused.status_code == 400 or '"code":400' in refused.text, refused.text
    answer = server.chat(messages=[picture_message(seed)])
    assert answer.status_code == 200, answer.text


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "chat_template": {"chat_template": "{{ messages }}"},
    "chat_template inside": {"chat_template_kwargs": {"chat_template": "x"}},
    "mm_processor_kwargs": {"mm_processor_kwargs": {}},
    "media_io_kwargs": {"media_io_kwargs": {"image": {}}},
    "n 0": {"n": 0},
    "n 129": {"n": 129},
    "n 17000": {"n": 17_000},
    "max_tokens -1": {"max_tokens": -1},
    "max_tokens 1e9": {"max_tokens": 10**9},
    "temperature NaN": {"temperature": float("nan")},
    "temperature Infinity": {"temperature": float("inf")},
    "length_penalty NaN": {"length_penalty": float("nan")},
    "length_penalty -1e16": {"use_beam_search": True, "length_penalty": -1e16},
    "logit_bias NaN": {"logit_bias": {"1": float("nan")}},
    "logit_bias unknown": {"logit_bias": {"999999": 1}},
    "logit_bias -1": {"logit_bias": {"-1": 1}},
    "logit_bias word": {"logit_bias": {"x": 1}},
    "allowed_token_ids": {"allowed_token_ids": [999_999]},
    "stop_token_ids": {"stop_token_ids": [-5]},
    "top_k of 70 bits": {"top_k": 2**70},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "half a character in stop": {"stop": SURROGATE},
    "half a character in bad_words": {"bad_words": [SURROGATE]},
    "half a character as key": {"chat_template_kwargs": {SURROGATE: 1}},
    "half a character as field": {SURROGATE: 1},
    "half a character in request_id": {"request_id": SURROGATE},
    "half a character in pruning_ratio": {"pruning_ratio": SURROGATE},
    "truncation": {"messages": [picture_message(1)], "truncate_prompt_tokens": 10},
    "engine argument": {"vllm_xargs": {"kv_transfer_params": "x"}},
    "ratio as argument": {"vllm_xargs": {"pruning_ratio": 0.5}},
    "regex": {"structured_outputs": {"regex": "("}},
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields(server: Server, name: str) -> None:
    with server.unharmed():
        assert_refused(server.chat(**BAD_FIELDS[name]))


@pytest.mark.parametrize(
    "route", ["/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"]
)
@pytest.mark.parametrize("name", ["half a character in stop", "engine argument", "uuid"])
def test_bad_fields_elsewhere(server: Server, route: str, name: str) -> None:
    messages = BAD_PARTS.get(name, user("Hi"))
    body = {"model": server.model, "messages": messages, "input": messages, "max_tokens": 1}
    with server.unharmed():
        assert_refused(server.post(route, json.dumps(body | BAD_FIELDS.get(name, {}))))


@pytest.mark.parametrize(
    "item",
    [
        {"type": "message", "role": "assistant", "id": "a", "status": "completed", "content": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": ["text"]},
        {"type": "custom_tool_call", "input": "x"},
    ],
)
def test_past_answers_that_are_none(server: Server, item: dict[str, Any]) -> None:
    with server.unharmed():
        body = json.dumps({"model": server.model, "input": [item], "max_output_tokens": 1})
        assert_refused(server.post("/v1/responses", body))


@pytest.mark.parametrize("prompt", ["<image>", SURROGATE, [999_999], [-1], [2**70], [], ""])
def test_bad_prompts(server: Server, prompt: object) -> None:
    with server.unharmed():
        body = json.dumps({"model": server.model, "prompt": prompt, "max_tokens": 1})
        assert_refused(server.post("/v1/completions", body))


def test_what_only_looks_bad(server: Server) -> None:
    assert server.chat(messages=user("a\0b")).status_code == 200
    assert server.chat(messages=user("<imag e> and image>")).status_code == 200
    assert server.chat(truncate_prompt_tokens=10).status_code == 200
    assert server.chat(user="nobody", seed=2**62, logit_bias={"1": 5}).status_code == 200


ROUTES = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations"]
BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "application/json"),
    "list": ("[]", "application/json"),
    "empty": ("", "application/json"),
    "deep": ("[" * 20_000, "application/json"),
    "deep object": ('{"model":' * 20_000 + "1" + "}" * 20_000, "application/json"),
    "not UTF-8": (b'{"model": "\xff"}', "application/json"),
    "content type": ("{}", "text/plain"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_bad_bodies(server: Server, route: str) -> None:
    with server.unharmed():
        for body, kind in BODIES.values():
            assert_refused(server.post(route, body, kind))


def test_unknown_model_route_and_method(server: Server) -> None:
    with server.unharmed():
        assert_refused(server.chat(model="none"), 404)
        assert_refused(server.post("/v1/nothing", "{}"), 404)
        assert_refused(server.http.get(CHAT), 405)
        assert_refused(server.http.get("/nothing"), 404)


def test_a_body_over_the_default_limit(server: Server) -> None:
    with server.unharmed():
        assert_refused(server.post(CHAT, b"x" * 100_000_000), 413, "server.max_body_bytes")


def test_bodies_over_the_limit(guarded: Server) -> None:
    pieces: list[Callable[[], Any]] = [
        lambda: b"x" * (MAX_BODY + 1),
        lambda: (b"x" * 2**16 for _ in range(2 * MAX_BODY // 2**16)),
    ]
    for route in (CHAT, "/v1/responses"):
        for body in pieces:
            with guarded.unharmed():
                assert_refused(guarded.post(route, body()), 413, str(MAX_BODY))


def test_a_body_that_never_ends_is_answered_at_once(guarded: Server) -> None:
    request = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key\r\n"
    with socket.create_connection((guarded.http.base_url.host, guarded.http.base_url.port)) as raw:
        raw.settimeout(10)
        raw.sendall(f"{request}Content-Length: {10**15}\r\n\r\nabc".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    assert guarded.chat().status_code == 200


def test_wrong_keys(guarded: Server) -> None:
    with guarded.unharmed():
        for key in ("", "Bearer no", "Basic key"):
            answer = guarded.http.get("/v1/models", headers={"Authorization": key})
            assert_refused(answer, 401)
            assert answer.headers["X-Request-Id"]


def test_request_ids_of_errors(guarded: Server) -> None:
    answer = guarded.http.get("/v1/nothing", headers={"X-Request-Id": "mine"})
    assert_refused(answer, 404)
    assert answer.headers["X-Request-Id"] == "mine"


def test_more_pictures_than_the_operator_allows(guarded: Server) -> None:
    with guarded.unharmed():
        assert_refused(guarded.chat(messages=[picture_message(1, 2)]), words="At most 1")


def test_the_operators_own_limits(guarded: Server) -> None:
    with guarded.unharmed():
        answer = guarded.chat(messages=picture(data_url(encoded(Image.new("1", (101, 100))))))
        assert_refused(answer, words="10000")
        assert guarded.chat(messages=picture(png_url(1), uuid="a")).status_code == 200


def test_a_full_queue_says_when_to_come_again(
    guarded: Server, guarded_process: tuple[str, Popen[bytes]]
) -> None:
    engine = engine_of(guarded_process[1])
    body = {"model": guarded.model, "messages": user("Hi"), "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(8) as clients:
        url = guarded.http.base_url.join(CHAT)
        engine.suspend()  # nothing is answered before somebody is turned away
        jobs = [
            clients.submit(httpx.post, url, json=body, headers=KEY, timeout=60) for _ in range(8)
        ]
        wait(jobs, timeout=30, return_when=FIRST_COMPLETED)
        engine.resume()
        refused = [job.result() for job in jobs if job.result().status_code != 200]
    assert 0 < len(refused) < 8
    for answer in refused:
        assert_refused(answer, 503, "busy")
        assert answer.headers["Retry-After"] == "5"
    assert guarded.chat().status_code == 200


class Upstream(BaseHTTPRequestHandler):
    """Where pictures are: answers with the status in the path."""

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
        with suppress(ConnectionError):  # The server does not wait for everything.
            super().handle()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the paths that were fetched from it."""
    seen: list[str] = []
    handler = type("Handler", (Upstream,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_nothing_is_fetched_unasked(server: Server, upstream: tuple[str, list[str]]) -> None:
    url, seen = upstream
    with server.unharmed():
        for host in (url, url.replace("127.0.0.1", "localhost"), url.replace("http", "HTTP")):
            assert_refused(server.chat(messages=picture(f"{host}/200")), words="data URLs")
    assert seen == []


def test_pictures_from_an_allowed_host(guarded: Server, upstream: tuple[str, list[str]]) -> None:
    url, seen = upstream
    assert guarded.chat(messages=picture(f"{url}/200")).status_code == 200
    other = url.replace("127.0.0.1", "localhost")
    assert_refused(guarded.chat(messages=picture(f"{other}/200")), words="allowed domains")
    assert seen == ["/200"]


def test_redirects_are_not_followed(guarded: Server, upstream: tuple[str, list[str]]) -> None:
    url, seen = upstream
    with guarded.unharmed():
        assert_refused(guarded.chat(messages=picture(f"{url}/302")))
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
def test_an_upstream_that_fails(
    guarded: Server, upstream: tuple[str, list[str]], path: str, words: str
) -> None:
    with guarded.unharmed():
        start = time.monotonic()
        assert_refused(guarded.chat(messages=picture(upstream[0] + path)), 422, words)
        assert time.monotonic() - start < 5


def test_an_upstream_that_is_not_there(guarded: Server) -> None:
    with socket.socket() as free, guarded.unharmed():
        free.bind(("127.0.0.1", 0))
        start = time.monotonic()
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
        assert_refused(guarded.chat(messages=picture(url)), 422, "cannot be fetched")
        assert time.monotonic() - start < 5
