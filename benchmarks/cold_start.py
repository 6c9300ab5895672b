"""From nothing to the first token: processes that start afresh."""

import time
from collections import defaultdict
from collections.abc import Callable

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.asks import QUESTION, Ask, user_turn
from benchmarks.engines import OURS, STOCK, EngineName, EngineProcess
from benchmarks.rounds import LONG_ROUNDS, Row, summary

RATIO = 8 / 9


def _start(start: Callable[[EngineName], EngineProcess], name: EngineName) -> tuple[float, float]:
    """Seconds until the engine is ready, and until its first token about an image."""
    began = time.perf_counter()
    engine = start(name)
    try:
        ready = time.perf_counter() - began
        engine.run("images", asks=[Ask(user_turn(QUESTION), (1,), RATIO, 1)])
        return ready, time.perf_counter() - began
    finally:
        engine.stop()


def measure_cold_start(
    start: Callable[[EngineName], EngineProcess], rounds: int, bar: tqdm
) -> list[Row]:
    """Start stock vLLM and ours in turn, alone on the machine, files in the page cache.

    Ideal is to start as fast as stock.

    Args:
        start: Starts an engine's process and returns once it is ready.
        rounds: At most so many, after one that does not count: it fills caches, on disk too.
        bar: Gets one update per round.
    """
    figures: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, min(rounds, LONG_ROUNDS)):
        order = (STOCK, OURS) if number % 2 else (OURS, STOCK)
        seconds = {name: _start(start, name) for name in order}
        if number < 0:
            continue
        for i, until in enumerate(("ready", "first_token")):
            stock, ours = seconds[STOCK][i], seconds[OURS][i]
            figures[f"stock_{until}_seconds"].append(stock)
            figures[f"ours_{until}_seconds"].append(ours)
            figures[f"{until}_seconds_over_stock"].append(ours - stock)
        bar.update()
    return [summary(figures, [name for name in figures if name.endswith("_over_stock")])]
