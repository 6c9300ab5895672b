"""Times parts of an engine's step, also on an asynchronous device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds.

    Args:
        synchronise: Waits for the device, so that its work counts. The waits slow the whole run:
            take its total time from another run.

    Attributes:
        seconds, uses: Totals since :meth:`reset`.
    """

    def __init__(self, synchronise: Callable[[], object] = lambda: None) -> None:
        self._synchronise = synchronise
        self.reset()

    def reset(self) -> None:
        self.seconds, self.uses = 0.0, 0

    @contextmanager
    def time(self) -> Iterator[None]:
        """Time a block; the interface of a Prometheus histogram."""
        self.uses += 1
        self._synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self.seconds += time.perf_counter() - start
