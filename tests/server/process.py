"""``vitcop-serve`` in its own process, for tests."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import psutil  # type: ignore[import-untyped]

from benchmarks import serving

LITTLE_MEMORY = ("--kv-cache-memory-bytes", "512M", "--mm-processor-cache-gb", "0.1")
"""Options of a server that runs beside others; vLLM allocates the whole KV cache at start-up."""

TINY_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M"),
    *("--mm-processor-cache-gb", "0.003"),
    *("--allowed-origins", '["*"]'),  # vLLM's default allows none
)
"""Options of a tiny model's server; several such servers run at the same time."""

IMAGE_ROOM = 5
"""Images that fit into the image cache of such a server."""

LOGS: list[IO[str]] = []
"""Logs of the running servers, shown when a test fails."""


@contextmanager
def running_server(
    *arguments: str, stock: bool = False, forks: bool = True
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """:func:`benchmarks.serving.running_server` with a log for failed tests.

    The engine runs in its own process, although the tests' own engines do not. It finds no C++
    compiler, as on many laptops and in the CPU image.

    Args:
        *arguments: The server's arguments without host and port.
        stock: Start vLLM's own server, without the plugin.
        forks: Fork the server's processes, which is faster than vLLM's way.
    """
    python = (sys.executable, *(("-m", "tests.forking") if forks else ()))
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["CXX"] = "no-such-compiler"
    with tempfile.TemporaryFile("a+") as log:
        LOGS.append(log)
        try:
            with serving.running_server(
                *arguments, stock=stock, environment=environment, log=log, python=python
            ) as server:
                yield server
        finally:
            LOGS.remove(log)


def log_tail(log: IO[str], lines: int = 20) -> str:
    """The end of a server's log, without its lines about requests."""
    log.seek(0)
    return "\n".join(
        [line for line in log.read().splitlines() if not line.startswith("INFO:")][-lines:]
    )


def engine_of(server: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of a server's engine."""
    (engine,) = [
        child
        for child in psutil.Process(server.pid).children()
        if "EngineCore" in " ".join(child.cmdline())
    ]
    return engine
