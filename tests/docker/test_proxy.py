"""The proxy's configuration, run by a real nginx in front of two upstream servers."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.docker.files import DOCKER
from tests.docker.upstream import Upstream, upstream
from tests.server.sample_images import image_message

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

# CI sets REQUIRE_NGINX where it installs nginx, so a missing nginx fails instead of skipping.
pytestmark = pytest.mark.skipif(
    NGINX is None and "REQUIRE_NGINX" not in os.environ, reason="nginx is not installed"
)

PASSED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/pruning/explain"),
    ("POST", "/v1/pruning/image"),
    ("GET", "/v1/models"),
    ("GET", "/v1/pruning/plan?width=640&height=480&ratio=0.889"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/ui"),
    ("GET", "/ui/script.js"),
]
KEPT_INSIDE = [
    "/",
    "/metrics",
    "/metrics/",
    "/docs",
    "/openapi.json",
    "/invocations",
    "/tokenize",
    "/detokenize",
    "/version",
    "/ping",
    "/load",
    "/inference/v1/generate",
    "/v2/models",
    "/healthy",
    "/uix",
    "/V1/models",
    "//metrics",
    "/v1/../metrics",
    "/v1/%2e%2e/metrics",
    "/v1/x/..%2f..%2fmetrics",
    "/%6detrics",
]


@dataclass
class Proxy:
    url: str
    port: int
    replicas: list[Upstream]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def proxy_before(folder: Path, ports: list[int]) -> Iterator[tuple[str, int]]:
    """Run nginx with the deployed files; only host names, ports and folders are replaced."""
    port, health_port = free_port(), free_port()
    main = (DOCKER / "nginx/nginx.conf").read_text()
    main = main.replace("listen 8080", f"listen 127.0.0.1:{port}")
    main = main.replace("listen 127.0.0.1:8081", f"listen 127.0.0.1:{health_port}")
    main = main.replace("/tmp/", f"{folder}/").replace(
        "worker_processes auto", "worker_processes 1"
    )
    servers = (DOCKER / "nginx/replicas.conf").read_text().replace("resolver ", "# resolver ")
    for index, replica_port in enumerate(ports):
        servers = servers.replace(f"replica-{index}:8000 resolve", f"127.0.0.1:{replica_port}")
    (folder / "nginx.conf").write_text(main)
    (folder / "upstream.conf").write_text(servers)
    # Started by root, nginx runs its workers as user nobody, who cannot write to the test's folder.
    user = "user root root;" if os.geteuid() == 0 else ""
    command = [NGINX or "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "-g", f"daemon off; {user}"], stdout=log, stderr=log)
        try:
            wait_for(health_port, process, folder / "log")
            yield f"http://127.0.0.1:{port}", port
        finally:
            process.terminate()
            process.wait(10)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nginx does not listen: {log.read_text()}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with upstream() as first, upstream() as second:
        folder = tmp_path_factory.mktemp("nginx")
        with proxy_before(folder, [first.port, second.port]) as (url, port):
            yield Proxy(url, port, [first, second])


@pytest.fixture
def proxy(running: Proxy) -> Proxy:
    for replica in running.replicas:
        replica.paths.clear()
        replica.unavailable = False
        replica.continue_stream.clear()
    return running


def upstream_paths(proxy: Proxy) -> list[str]:
    """Paths of the requests that reached a replica."""
    return [path for replica in proxy.replicas for path in replica.paths]


def raw_request(port: int, target: str) -> str:
    """Send a path that client libraries would normalise. Returns the raw answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(f"GET {target} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer.decode()


def replica_of(proxy: Proxy, session: str | None) -> int:
    headers = {} if session is None else {"X-Session-ID": session}
    port: int = httpx.get(f"{proxy.url}/v1/models", headers=headers).json()["port"]
    return port


def session_of(proxy: Proxy, replica: Upstream) -> str:
    """A session that the proxy sends to this replica."""
    return next(s for s in map(str, range(100)) if replica_of(proxy, s) == replica.port)


@pytest.mark.parametrize(("method", "path"), PASSED, ids=lambda v: str(v))
def test_public_path_reaches_a_replica(proxy: Proxy, method: str, path: str) -> None:
    assert httpx.request(method, proxy.url + path).status_code == 200
    assert upstream_paths(proxy) == [path]


@pytest.mark.parametrize("path", KEPT_INSIDE)
def test_internal_path_gets_404(proxy: Proxy, path: str) -> None:
    answer = raw_request(proxy.port, path)
    assert answer.startswith("HTTP/1.1 404")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["type"] == "NotFoundError"
    assert upstream_paths(proxy) == []


def test_upstream_gets_the_normalised_path(proxy: Proxy) -> None:
    # The server would answer any path that begins with /metrics as /metrics.
    assert raw_request(proxy.port, "/metrics/../v1/models").startswith("HTTP/1.1 200")
    assert upstream_paths(proxy) == ["/v1/models"]


def test_ratio_header_passes_in_both_directions(proxy: Proxy) -> None:
    answer = httpx.post(
        f"{proxy.url}/v1/chat/completions", headers={"X-Pruning-Ratio": "0.889"}, json={}
    )
    assert answer.json()["ratios"] == ["0.889"]
    assert answer.headers["X-Pruning-Ratio"] == "0.889"


def test_a_repeated_ratio_header_is_not_merged(proxy: Proxy) -> None:
    # The server refuses a repeated header, so it must receive both.
    headers = [("X-Pruning-Ratio", "0.5"), ("X-Pruning-Ratio", "0.7")]
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", headers=headers, json={})
    assert answer.json()["ratios"] == ["0.5", "0.7"]


def test_events_are_not_buffered(proxy: Proxy) -> None:
    with httpx.stream("POST", f"{proxy.url}/v1/stream", timeout=10) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "data: first"  # Upstream has not sent the second event.
        for replica in proxy.replicas:
            replica.continue_stream.set()
        assert "data: second" in list(lines)


def test_a_session_stays_with_one_replica(proxy: Proxy) -> None:
    assert len({replica_of(proxy, "a") for _ in range(5)}) == 1


def test_sessions_are_spread(proxy: Proxy) -> None:
    assert len({replica_of(proxy, str(session)) for session in range(30)}) == 2


def test_requests_without_a_session_are_spread(proxy: Proxy) -> None:
    assert len({replica_of(proxy, None) for _ in range(30)}) == 2


def test_the_other_replica_answers_for_a_draining_one(proxy: Proxy) -> None:
    draining, other = proxy.replicas
    session = session_of(proxy, draining)
    draining.unavailable = True
    headers = {"X-Session-ID": session}
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", headers=headers, json={"n": 1})
    assert (answer.status_code, answer.json()["port"]) == (200, other.port)
    assert answer.json()["body_bytes"] > 0
    draining.unavailable = False
    assert replica_of(proxy, session) == draining.port  # At once: a 503 does not mark it as down.


def test_the_client_gets_the_503_if_all_replicas_answer_503(proxy: Proxy) -> None:
    for replica in proxy.replicas:
        replica.unavailable = True
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", json={})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json() == {"error": "draining"}
    assert [len(replica.paths) for replica in proxy.replicas] == [1, 1]


def test_a_body_of_8_mib_passes(proxy: Proxy) -> None:
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", content=bytes(8 << 20))
    assert answer.json()["body_bytes"] == 8 << 20


@pytest.mark.parametrize(
    ("path", "outer", "kind"),
    [
        ("/v1/x", {}, "RequestEntityTooLargeError"),
        ("/v1/messages", {"type": "error"}, "request_too_large"),
        ("/v1/messages/count_tokens", {"type": "error"}, "request_too_large"),
    ],
)
def test_a_body_above_65_mib_gets_413(
    proxy: Proxy, path: str, outer: dict[str, str], kind: str
) -> None:
    # The proxy refuses the declared length; the body is not sent.
    request = f"POST {path} HTTP/1.0\r\nHost: x\r\nContent-Length: {66 << 20}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as connection:
        connection.sendall(request.encode())
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413")
    document = json.loads(answer.partition("\r\n\r\n")[2])
    assert document.pop("error")["type"] == kind
    assert document == outer
    assert upstream_paths(proxy) == []


def test_the_other_replica_answers_for_a_dead_one(tmp_path: Path) -> None:
    with upstream() as alive, proxy_before(tmp_path, [free_port(), alive.port]) as (url, _):
        answers = [httpx.post(f"{url}/v1/chat/completions", json={}) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}


def test_the_proxy_answers_503_without_a_live_replica(tmp_path: Path) -> None:
    with proxy_before(tmp_path, [free_port(), free_port()]) as (url, _):
        answer = httpx.post(f"{url}/v1/chat/completions", json={})
        anthropic = httpx.post(f"{url}/v1/messages", json={})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert (anthropic.status_code, anthropic.headers["Retry-After"]) == (503, "5")
    assert anthropic.json()["type"] == "error"
    assert anthropic.json()["error"]["type"] == "overloaded_error"


@pytest.mark.slow
def test_no_internal_path_of_the_real_server_is_reached(server_url: str, tmp_path: Path) -> None:
    # The first request builds the schema, which takes seconds on a slow machine.
    schema = httpx.get(f"{server_url}/openapi.json", timeout=60)
    paths = [*schema.json()["paths"], "/metrics", "/docs"]
    inside = [path for path in paths if not re.match("/(v1/|(health|ready|ui)$)", path)]
    assert "/tokenize" in inside
    server_port = int(server_url.rpartition(":")[2])
    with proxy_before(tmp_path, [server_port, server_port]) as (url, port):
        for path in inside:
            assert "There is no such path here" in raw_request(port, path), path
        body = {"max_tokens": 2, "messages": [image_message(1)]}
        headers = {"X-Pruning-Ratio": "0.5"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["X-Pruning-Ratio"]) == (200, "0.5")
