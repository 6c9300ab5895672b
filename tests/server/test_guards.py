"""The operator's limits: body size, API keys, image size, queue length."""

import socket
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from subprocess import Popen
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.clients import CHAT, KEY, MAX_BODY, Server, assert_refused, one_image, user
from tests.server.process import engine_of
from tests.server.sample_images import image_message, png_url
from tests.server.test_media import data_url, encoded

pytestmark = pytest.mark.slow


def test_bodies_over_the_limit_are_refused(guarded: Server) -> None:
    pieces: list[Callable[[], Any]] = [
        lambda: b"x" * (MAX_BODY + 1),
        lambda: (b"x" * 2**16 for _ in range(2 * MAX_BODY // 2**16)),
    ]
    for route in (CHAT, "/v1/responses"):
        for body in pieces:
            with guarded.stays_usable():
                assert_refused(guarded.post(route, body()), 413, str(MAX_BODY))


def test_a_body_that_never_ends_is_answered_at_once(guarded: Server) -> None:
    request = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key\r\n"
    with socket.create_connection((guarded.http.base_url.host, guarded.http.base_url.port)) as raw:
        raw.settimeout(10)
        raw.sendall(f"{request}Content-Length: {10**15}\r\n\r\nabc".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")
    assert guarded.chat().status_code == 200


def test_wrong_keys_are_refused(guarded: Server) -> None:
    with guarded.stays_usable():
        for key in ("", "Bearer no", "Basic key"):
            answer = guarded.http.get("/v1/models", headers={"Authorization": key})
            assert_refused(answer, 401)
            assert answer.headers["X-Request-Id"]


def test_errors_carry_the_request_id(guarded: Server) -> None:
    answer = guarded.http.get("/v1/nothing", headers={"X-Request-Id": "mine"})
    assert_refused(answer, 404)
    assert answer.headers["X-Request-Id"] == "mine"


def test_more_images_than_allowed_are_refused(guarded: Server) -> None:
    with guarded.stays_usable():
        assert_refused(guarded.chat(messages=[image_message(1, 2)]), words="At most 1")


def test_configured_limits_replace_the_defaults(guarded: Server) -> None:
    with guarded.stays_usable():
        answer = guarded.chat(messages=one_image(data_url(encoded(Image.new("1", (101, 100))))))
        assert_refused(answer, words="10000")
        assert guarded.chat(messages=one_image(png_url(1), uuid="a")).status_code == 200


def test_a_full_queue_sends_retry_after(
    guarded: Server, guarded_process: tuple[str, Popen[bytes]]
) -> None:
    engine = engine_of(guarded_process[1])
    body = {"model": guarded.model, "messages": user("Hi"), "max_tokens": 100, "ignore_eos": True}
    with ThreadPoolExecutor(8) as clients:
        url = guarded.http.base_url.join(CHAT)
        engine.suspend()  # so that the queue fills
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
