"""Engines side by side: stock vLLM, ours, and a peer, each in its own process.

One engine works at a time; the others wait for their next command.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.measured_engine import MeasuredEngine, Result
from benchmarks.serving import NO_PLUGIN
from vitcop_vllm.pruning.settings import CONFIG_KEY, SelectorName

EngineName = Literal["stock", "evs"] | SelectorName
"""Stock vLLM, without or with its pruning of videos, or ours with this selector."""

STOCK: EngineName = "stock"
EVS: EngineName = "evs"
"""Stock vLLM with ``video_pruning_rate``: one rate for all requests, in all layers."""

EVS_RATIO = "8/9"
"""The rate: as many tokens as ours keeps at this ratio, averaged over layers."""

OURS: SelectorName = "vitcop"
PEER: SelectorName = "cls"
"""Prunes only in the encoder and only by [CLS], like VisionZip, in the same engine and at the same
layer average."""

_engine: MeasuredEngine | None = None
"""This process's engine, if an :class:`EngineProcess` started the process."""


def _start(options: dict[str, Any], name: EngineName) -> None:
    global _engine
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pruning = options.pop(CONFIG_KEY, {})
    is_stock = name in (STOCK, EVS)
    if is_stock:
        os.environ.update(NO_PLUGIN)
    else:
        options["additional_config"] = {CONFIG_KEY: {**pruning, "selector": name}}
    if name == EVS:
        options["video_pruning_rate"] = float(Fraction(EVS_RATIO))
    _engine = MeasuredEngine(options, pruned=not is_stock)


def _run(command: str, arguments: dict[str, Any]) -> Result:
    result: Result = getattr(_engine, command)(**arguments)
    return result


class EngineDiedError(RuntimeError):
    """An engine's process ended without an answer."""


class EngineProcess:
    """A process with an engine; the constructor waits until the engine is ready.

    Args:
        model: The checkpoint's folder.
        options: Other arguments of ``vllm.LLM``; ``pruning`` holds settings for engines that
            prune.
        name: The engine.

    Raises:
        EngineDiedError: If the process ends before the engine is ready.
    """

    def __init__(self, model: Path, options: dict[str, Any], name: EngineName) -> None:
        self._name = name
        self._executor = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=({"model": str(model), **options}, name),
        )
        self.run("about")

    def run(self, command: str, **arguments: Any) -> Result:
        """Call a method of the :class:`MeasuredEngine`.

        Raises:
            EngineDiedError: If the engine's process ended.
        """
        try:
            return self._executor.submit(_run, command, arguments).result()
        except BrokenProcessPool:
            raise EngineDiedError(
                f"the process of engine {self._name} ended. If it printed no error, the kernel "
                "killed it because memory ran out: free some, or lower --kv-cache-gib"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown()


@contextmanager
def running_engines(
    model: Path, options: dict[str, Any], names: Sequence[EngineName]
) -> Iterator[dict[EngineName, EngineProcess]]:
    """Engines with the same weights and options, by name."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(EngineProcess(model, options, name)) for name in names}
