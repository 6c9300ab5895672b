"""Starts this project's server or stock vLLM's, and always stops it.

vLLM's ``bench sweep`` has a class for this, but it keeps no log and kills the server at once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml
from pydantic import ValidationError

from vitcop_vllm.demo.checkpoint import resolve
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import (
    CONFIG_KEY,
    PruningSettings,
    SelectorName,
    format_validation_error,
)

START_SECONDS = 900
"""Loading a large model takes minutes. If the server stops, the wait ends at once."""

STOP_SECONDS = 60

NO_PLUGIN = {"VLLM_PLUGINS": ""}
"""Environment that makes vLLM ignore this plugin."""


class ServerError(RuntimeError):
    """A server did not start, or did not answer."""


def server_arguments(selector: SelectorName, config: Path) -> list[str]:
    """Arguments that serve ``config`` with another selector.

    Raises:
        ServerError: If the file cannot be read, or lacks an option that the selector needs.
    """
    row = selector_of(selector)
    chosen: dict[str, Any] = {"selector": selector}
    batch = []
    try:
        options = yaml.safe_load(config.read_text())
        if not row.prunes_encoder:
            # Every visual token passes through the first layers, which limits the ratio.
            settings = PruningSettings(**options.get(CONFIG_KEY) or {})
            layers = _decoder_layers(options["model"])
            limit = row.max_ratio(settings.boundaries(layers), layers)
            chosen["max_pruning_ratio"] = min(limit, settings.max_pruning_ratio)
        if row.reads_question and "max-model-len" in options:
            # The selector needs the whole prompt in one step.
            batch = ["--max-num-batched-tokens", str(options["max-model-len"])]
    except ValidationError as error:
        raise ServerError(f"{config}: {format_validation_error(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ServerError(f"{config}: {error}") from None
    return ["--config", str(config), f"--{CONFIG_KEY}", json.dumps(chosen), *batch]


def _decoder_layers(model: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve(model))
    layers: int = config.get_text_config().num_hidden_layers
    return layers


@contextmanager
def running_server(
    *arguments: str,
    stock: bool = False,
    environment: Mapping[str, str] | None = None,
    log: IO[str] | None = None,
    python: Sequence[str] = (sys.executable,),
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server, wait until it answers, and yield its root URL and process.

    The end stops the server and its child processes, also after Ctrl-C, SIGTERM and errors.

    Args:
        *arguments: The server's arguments without host and port.
        stock: Start vLLM's own server, without the plugin.
        environment: The server's environment; by default this process's.
        log: The server's output, open for appending and reading; by default a temporary file.
        python: The command that gets ``-m MODULE`` and the server's arguments.

    Raises:
        ServerError: If the server stops or does not answer; holds the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    module = "vitcop_server"
    if stock:
        # The module of `vllm serve`. The command itself does not start with vLLM's CPU build,
        # whose distribution has another name.
        module = "vllm.entrypoints.openai.api_server"
        environment = {**(os.environ if environment is None else environment), **NO_PLUGIN}
    command = [*python, "-m", module, *arguments]
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_exit())
        log = log or stack.enter_context(tempfile.TemporaryFile("a+"))
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches only this process, which then stops the server's process group.
            start_new_session=True,
        )
        try:
            _wait(f"{url}/health", process, log)
            yield url, process
        finally:
            _stop(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(url):
        stopped = process.poll() is not None
        if stopped or time.monotonic() > deadline:
            log.seek(0)
            what = "stopped" if stopped else f"did not answer within {START_SECONDS} seconds"
            raise ServerError(f"the server {what}; the end of its log:\n{log.read()[-3000:]}")
        time.sleep(0.5)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:  # connection refused, reset or timed out; HTTP errors
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # The group is empty.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the server is stopped."""

    def leave(number: int, frame: FrameType | None) -> Any:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
