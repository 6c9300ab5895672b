"""Cold start: seconds from a new process to a ready engine, and to the first token for an image.

vLLM's ``bench startup`` leaves out the imports and the first token, which compiles kernels; a user
waits for all of it. The ideal is to start as fast as stock vLLM.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from benchmarks.engines import OURS, STOCK, EngineName, EngineProcess
from benchmarks.requests import QUESTION, ImageRequest, user_turn
from benchmarks.rounds import Row, Turns, summary

Start = Callable[[EngineName], AbstractContextManager[EngineProcess]]
"""Starts an engine's process and waits until it is ready."""


def _seconds(start: Start, name: EngineName) -> dict[str, float]:
    began = time.perf_counter()
    with start(name) as engine:
        ready = time.perf_counter() - began
        engine.run("images", requests=[ImageRequest(user_turn(QUESTION), (1,), 8 / 9, 1)])
        return {"ready": ready, "first_token": time.perf_counter() - began}


def measure_cold_start(start: Start, rounds: int) -> list[Row]:
    """Start stock vLLM and ours in turn, one at a time, with their files in the page cache.

    One more round comes first and does not count: it fills caches, also on disk.
    """
    measured = []
    turns = Turns()
    for number in range(rounds + 1):
        seconds = turns.run({name: partial(_seconds, start, name) for name in (STOCK, OURS)})
        row: dict[str, float] = {}
        for until in ("ready", "first_token"):
            stock, ours = seconds[STOCK][until], seconds[OURS][until]
            row[f"stock_{until}_seconds"] = stock
            row[f"ours_{until}_seconds"] = ours
            row[f"{until}_seconds_over_stock"] = ours - stock
        if number:
            measured.append(row)
    return [summary(measured, "ready_seconds_over_stock", "first_token_seconds_over_stock")]
