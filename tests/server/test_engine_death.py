"""A server whose engine is killed."""

import os
import socket
import subprocess
import sys
import time

import httpx
import psutil  # type: ignore[import-untyped]
import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"the server did not start: {server.poll()}")


@pytest.mark.slow
def test_process_exits_with_an_error() -> None:
    port = free_port()
    # The tests' own engine runs in their process; the server's has one of its own.
    environ = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-m", "server", "--config", "configs/demo-cpu.yaml"]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], env=environ
    ) as server:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            children = psutil.Process(server.pid).children()
            (engine,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
            engine.kill()
            assert server.wait(timeout=60) == 1
        finally:
            server.kill()
