"""Times parts of an engine's step, also on an asynchronous device."""

import time
from collections.abc import Callable
from typing import Self


class Stopwatch:
    """A context manager that adds up seconds; nested uses count once.

    Args:
        synchronise: Waits for the device, so that its work counts. The waits slow the whole run:
            take its total time from another run.

    Attributes:
        seconds, uses: Totals since :meth:`reset`.
    """

    def __init__(self, synchronise: Callable[[], object] = lambda: None) -> None:
        self._synchronise = synchronise
        self._depth = 0
        self._start = 0.0
        self.reset()

    def reset(self) -> None:
        self.seconds, self.uses = 0.0, 0

    def time(self) -> Self:
        """The interface of a Prometheus histogram's timer."""
        return self

    def __enter__(self) -> Self:
        if not self._depth:
            self._synchronise()
            self._start = time.perf_counter()
        self._depth += 1
        self.uses += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._synchronise()
            self.seconds += time.perf_counter() - self._start
