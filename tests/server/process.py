"""``vitcop-serve`` in a process of its own, for tests."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import psutil  # type: ignore[import-untyped]

from benchmarks import serving

LITTLE_MEMORY = ("--kv-cache-memory-bytes", "512M", "--mm-processor-cache-gb", "0.1")
"""For a server that runs beside others. vLLM fills all of its KV cache with zeros at start-up."""

TINY_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M"),
    *("--mm-processor-cache-gb", "0.003"),
    *("--allowed-origins", '["*"]'),  # vLLM's default allows none
)
"""What a server of a tiny model is started with: several live at a time, by the end of a run."""

IMAGE_ROOM = 5
"""Images that the image cache of such a server holds."""


LOGS: list[IO[str]] = []
"""What each running server has written: shown with a test that fails."""


@contextmanager
def running_server(
    *arguments: str, stock: bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Root URL and process of a server that answers; see :func:`serving.running_server`.

    The tests' own engine runs in their process; the server's has one of its own.

    Args:
        *arguments: The server's.
        stock: vLLM's own server without the plugin.
    """
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with tempfile.TemporaryFile("a+") as log:
        LOGS.append(log)
        try:
            with serving.running_server(
                *arguments, stock=stock, environment=environment, log=log
            ) as server:
                yield server
        finally:
            LOGS.remove(log)


def last_words(log: IO[str], lines: int = 20) -> str:
    """The end of a server's log, without a line for each request."""
    log.seek(0)
    return "\n".join(
        [line for line in log.read().splitlines() if not line.startswith("INFO:")][-lines:]
    )


def engine_of(server: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of a server's only engine."""
    (engine,) = [
        child
        for child in psutil.Process(server.pid).children()
        if "EngineCore" in " ".join(child.cmdline())
    ]
    return engine
