"""Times parts of an engine's step, on a device that may work apart from the host."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self


class Stopwatch:
    """Seconds between entering and leaving; entered again inside itself, it counts once.

    Args:
        synchronise: Waits for the device. Its work then counts, and the host loses its lead: a
            run that is watched must not be timed as a whole.

    Attributes:
        seconds, uses: In all, since :meth:`reset`.
    """

    def __init__(self, synchronise: Callable[[], object] = lambda: None) -> None:
        self._synchronise = synchronise
        self._depth = 0
        self._start = 0.0
        self.reset()

    def reset(self) -> None:
        self.seconds, self.uses = 0.0, 0

    def time(self) -> Self:
        """Itself, as a context manager: the form of a Prometheus histogram's timer."""
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


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Hide an attribute of ``owner``'s class behind one of its own."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
