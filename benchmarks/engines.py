"""Engines side by side: stock vLLM, ours, and others, each in a process of its own.

Only one of them works at a time; the others wait for their next command.
"""

import multiprocessing as mp
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from benchmarks.measured_engine import MeasuredEngine, Result
from benchmarks.serving import NO_PLUGIN
from vitcop_vllm.pruning.settings import CONFIG_KEY, SelectorName

EngineName = Literal["stock"] | SelectorName
"""Stock vLLM, or ours by its selector."""

STOCK: EngineName = "stock"
OURS: SelectorName = "vitcop"
PEER: SelectorName = "cls"
"""Chooses in the encoder alone and by [CLS] alone, as VisionZip and its like do: what a method
costs that never touches the decoder, in the same engine and at the same layer average."""


STOP_SECONDS = 60


def _work(connection: Connection, options: dict[str, Any], name: EngineName) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pruning = options.pop(CONFIG_KEY, {})
    if name == STOCK:
        os.environ.update(NO_PLUGIN)
    else:
        options["additional_config"] = {CONFIG_KEY: {**pruning, "selector": name}}
    engine = MeasuredEngine(options, pruned=name != STOCK)
    connection.send("ready")
    while (command := connection.recv()) is not None:
        connection.send(getattr(engine, command.pop("what"))(**command))


class EngineDiedError(RuntimeError):
    """An engine's process ended without an answer."""


class EngineProcess:
    """Handle to an engine's process; made once it is ready, and calls wait for its answer.

    Args:
        model: The checkpoint's folder.
        options: Other arguments of ``vllm.LLM``; under ``pruning`` settings of those that prune.
        name: Which engine it is.

    Raises:
        EngineDiedError: If the engine's process died.
    """

    def __init__(self, model: Path, options: dict[str, Any], name: EngineName) -> None:
        self._name = name
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, {"model": str(model), **options}, name)
        )
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None

    def _death(self) -> EngineDiedError:
        self._process.join(STOP_SECONDS)
        killed = self._process.exitcode == -signal.SIGKILL
        return EngineDiedError(
            f"the process of engine {self._name} "
            + (
                "was killed, as the kernel does when memory runs out: free some, or lower "
                "--kv-cache-gib"
                if killed
                else "died; its last words are above"
            )
        )

    def run(self, what: str, **command: Any) -> Result:
        """Have the engine do ``images``, ``text``, ``capacity`` or ``about``.

        See :class:`MeasuredEngine` for what each takes.

        Returns:
            Seconds of the whole, of each decode step, and to each request's first token, from
            its arrival and from when there was room for it; tokens of each prompt, and of these
            reused; each answer's ``tokens`` and text. Of ``images`` that are ``watched`` also
            seconds of the encoder and of Stages I to III. For ``capacity`` also the ``most``
            requests that ran at once, and the preemptions.

        Raises:
            EngineDiedError: If the engine's process died.
        """
        try:
            self._connection.send({"what": what, **command})
        except ConnectionError:
            raise self._death() from None
        answer: Result = self._answer()
        return answer

    def stop(self) -> None:
        if self._process.is_alive():
            self._connection.send(None)
            self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            # Whoever starts next needs its memory.
            self._process.kill()
            self._process.join()


@contextmanager
def running_engines(
    model: Path, options: dict[str, Any], names: Sequence[EngineName]
) -> Iterator[dict[EngineName, EngineProcess]]:
    """Engines with the same weights and options, by name."""
    engines: dict[EngineName, EngineProcess] = {}
    try:
        for name in names:
            engines[name] = EngineProcess(model, options, name)
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()
