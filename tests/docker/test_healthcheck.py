"""The images' health check."""

import subprocess
import sys

from tests.docker.files import DOCKER
from tests.docker.test_proxy import free_port
from tests.docker.upstream import upstream


def exit_status(port: int) -> int:
    command = [sys.executable, str(DOCKER / "healthcheck.py"), str(port)]
    return subprocess.run(command, timeout=30, check=False).returncode


def test_a_healthy_server_gives_status_0() -> None:
    with upstream() as server:
        assert exit_status(server.port) == 0
        assert server.paths == ["/health"]


def test_a_server_that_answers_503_gives_status_1() -> None:
    with upstream() as server:
        server.unavailable = True
        assert exit_status(server.port) == 1


def test_a_closed_port_gives_status_1() -> None:
    assert exit_status(free_port()) == 1


def test_the_health_check_ignores_http_proxy(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with upstream() as server:
        assert exit_status(server.port) == 0
