"""``python -m server`` in a process of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


@contextmanager
def running_server(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Base URL and process of a server that answers; stopped on leaving.

    Raises:
        AssertionError: With the end of its log, if it stops or does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # The tests' own engine runs in their process; the server's has one of its own.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-m", "server", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 240
            while not _answers(f"{url}/health"):
                log.seek(0)
                assert server.poll() is None, f"the server stopped:\n{log.read()[-4000:]}"
                assert time.monotonic() < deadline, f"no answer:\n{log.read()[-4000:]}"
                time.sleep(0.5)
            yield url, server
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            finally:
                server.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False
