"""Engines and servers are slow to start: each is shared by the whole session."""

import os

# Before vLLM is imported anywhere. One process lets tests look into scheduler and cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.engine.requests import ENGINE_OPTIONS, TINY

if TYPE_CHECKING:
    from vllm import LLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-1.5: 256 visual tokens, 8 decoder layers, grouped-query heads."""
    from vitcop_vllm.demo.checkpoint import save_random_llava

    path = tmp_path_factory.mktemp("tiny-llava")
    save_random_llava(path, TINY)
    return path


@pytest.fixture(scope="session")
def llm(checkpoint: Path) -> "LLM":
    """The pruned engine, in this process, as a user of ``LLM`` gets it."""
    from vllm import LLM

    return LLM(str(checkpoint), **ENGINE_OPTIONS)


@pytest.fixture(scope="session")
def server_url(checkpoint: Path) -> Iterator[str]:
    """Base URL of ``python -m server`` with the tiny model, as an operator starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "server", str(checkpoint), "--port", str(port), *options],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 240
            while not _answers(f"{url}/health"):
                log.seek(0)
                assert server.poll() is None, f"the server stopped:\n{log.read()[-4000:]}"
                assert time.monotonic() < deadline, f"no answer:\n{log.read()[-4000:]}"
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False
