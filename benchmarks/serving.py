"""Starts a server, this project's or stock vLLM's, and stops it whatever happens.

vLLM's ``bench sweep`` has a class for it, which keeps no log and kills a server at once.
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
from collections.abc import Iterator, Mapping
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
"""A large model is read for minutes. A server that stops is noticed at once."""

STOP_SECONDS = 60

NO_PLUGIN = {"VLLM_PLUGINS": ""}
"""Environment in which vLLM is stock vLLM."""


class ServerError(RuntimeError):
    """A server that does not start, or does not answer."""


def server_arguments(selector: SelectorName, config: Path) -> list[str]:
    """Arguments of ``vitcop-serve`` that serve ``config`` with another selector.

    Raises:
        ServerError: If the file cannot be read as far as the selector needs it.
    """
    row = selector_of(selector)
    chosen: dict[str, Any] = {"selector": selector}
    batch = []
    try:
        options = yaml.safe_load(config.read_text())
        if not row.prunes_encoder:
            # Every visual token passes the first layers: it cannot go as far as others.
            settings = PruningSettings(**options.get(CONFIG_KEY) or {})
            layers = _decoder_layers(options["model"])
            limit = row.max_ratio(settings.boundaries(layers), layers)
            chosen["max_pruning_ratio"] = min(limit, settings.max_pruning_ratio)
        if row.reads_question and "max-model-len" in options:
            # It needs each prompt in one step.
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
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Root URL and process of a server that answers.

    It and everything it started is gone afterwards, also after Ctrl-C, SIGTERM and errors.

    Args:
        *arguments: The server's; host and port are chosen here.
        stock: vLLM's own server without the plugin, instead of this project's.
        environment: The server's; by default this process's.
        log: Where the server writes, open for appending and reading; by default a file that
            is gone afterwards.

    Raises:
        ServerError: With the end of its log, if it stops or does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    module = "vitcop_server"
    if stock:
        # What `vllm serve` runs. The command itself cannot start where vLLM's CPU build is
        # installed, which has another name.
        module = "vllm.entrypoints.openai.api_server"
        environment = {**(os.environ if environment is None else environment), **NO_PLUGIN}
    command = [sys.executable, "-m", module, *arguments]
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_exit())
        log = log or stack.enter_context(tempfile.TemporaryFile("a+"))
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for us: we stop it, and with its group whatever it leaves behind.
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
    except OSError:  # Refused, reset or timed out; also HTTP errors.
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):  # Its group is empty.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM would end this process without a word to the server."""

    def leave(number: int, frame: FrameType | None) -> Any:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
