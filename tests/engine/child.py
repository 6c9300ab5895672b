"""Child processes that have imported vLLM when they start.

They are forked from one process that imports vLLM, which takes longer than the start of a tiny
engine.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import IO, Any

from tests.forking import fork_processes

SECONDS = 400
"""How long a child may run."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.worker.gpu_model_runner"])


def run_in_child(
    function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """What ``function`` returns in a child process, which ends with it.

    Args:
        function: A module's function, because the child imports it.
        args: Its arguments.
        environment: Variables of the child, beside those of this process.

    Raises:
        AssertionError: If the child ends without a result; holds the end of its output.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        variables = {**os.environ, **(environment or {})}
        child = CONTEXT.Process(
            target=_send_result, args=(sender, log.name, variables, function, args)
        )
        child.start()
        sender.close()
        try:
            assert receiver.poll(SECONDS), f"the child did not end:\n{_end(log)}"
            result = receiver.recv()
            child.join(SECONDS)
        except EOFError:
            raise AssertionError(f"the child ended without a result:\n{_end(log)}") from None
        finally:
            child.kill()
            child.join()
        return result


def _send_result(
    sender: Connection,
    log: str,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    fork_processes()
    sender.send(function(*args))


def _end(log: IO[str]) -> str:
    return log.read()[-20000:]
