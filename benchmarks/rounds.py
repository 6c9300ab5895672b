"""Rounds in which engines take turns at the same work, and medians over them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any, Self, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.asks import QUESTION, Ask, user_turn
from benchmarks.engines import OURS, PEER, STOCK, EngineName, EngineProcess
from benchmarks.measured_engine import Result
from benchmarks.shapes import Shape, image_marker
from vitcop_vllm.pruning.settings import SelectorName

LONG_ROUNDS = 3
"""At most so many of a scenario in which a round takes minutes."""

Row = dict[str, Any]
"""A line of a table: conditions, medians over rounds, and for some of them ``_spread``."""

Name = TypeVar("Name")


class Rounds:
    """Engines that take turns, and images that none of them has seen.

    Args:
        engines: By name; ``stock`` and ours at least.
        shape: Of their model.
        number: Rounds of each scenario; iterating counts them on ``bar``.
        watch_apart: Whether encoder and stages are timed in runs of their own. Where the
            device works apart from the host, timing them means waiting for it, which slows
            what else is timed. On a CPU it means reading a clock some ten times in a step, which
            takes microseconds.
    """

    def __init__(
        self,
        engines: Mapping[EngineName, EngineProcess],
        shape: Shape,
        number: int,
        bar: tqdm,
        *,
        watch_apart: bool = False,
    ) -> None:
        self.engines, self.shape = engines, shape
        self._number, self._bar, self._watch_apart = number, bar, watch_apart
        # One seed serves all engines once: no cache ever knows an image.
        self._seeds = count(1)
        self._turn = 0

    def __iter__(self) -> Iterator[int]:
        return self.at_most(self._number)

    def at_most(self, number: int) -> Iterator[int]:
        """Numbers of the rounds, ``number`` of them or fewer."""
        for done in range(min(number, self._number)):
            yield done
            self._bar.update()

    @property
    def selectors(self) -> list[SelectorName]:
        """Of the engines that prune."""
        return [name for name in (OURS, PEER) if name in self.engines]

    def with_image_size(self, size: int) -> Self:
        """The same rounds with images of that height and width in pixels."""
        rounds = copy(self)
        rounds.shape = replace(self.shape, image_size=size)
        return rounds

    def images(self, number: int) -> tuple[int, ...]:
        """Seeds of new images."""
        return tuple(next(self._seeds) for _ in range(number))

    def asks(
        self,
        number: int,
        ratio: float,
        max_tokens: int,
        *,
        images: int = 1,
        question: str = QUESTION,
    ) -> list[Ask]:
        """The same question, each time about new images."""
        prompt = user_turn(question, images, image_marker(self.shape))
        size = self.shape.image_size
        return [
            Ask(prompt, self.images(images), ratio, max_tokens, image_size=size)
            for _ in range(number)
        ]

    def in_turn(self, runs: Mapping[Name, Callable[[], Result]]) -> dict[Name, Result]:
        """Results of each run by its name; who goes first changes with every call."""
        order = list(runs)
        first = self._turn % len(order)
        self._turn += len(order) > 1  # a run by itself is nobody's turn
        results = {name: runs[name]() for name in (*order[first:], *order[:first])}
        return {name: results[name] for name in order}

    def serve(
        self,
        asks: Sequence[Ask],
        *,
        clients: int | None = None,
        watched: bool = False,
        names: Sequence[EngineName] | None = None,
    ) -> dict[EngineName, Result]:
        """The same requests on each engine, or those named, at most ``clients`` at a time."""
        command = {"asks": asks, "clients": clients, "watched": watched}
        return self.in_turn(
            {
                name: partial(self.engines[name].run, "images", **command)
                for name in names or self.engines
            }
        )

    def serve_watched(
        self, make: Callable[[], Sequence[Ask]], names: Sequence[EngineName] | None = None
    ) -> tuple[dict[EngineName, Result], dict[EngineName, Result]]:
        """Results of a run that is timed, and of one that tells encoder and stages.

        Args:
            make: Makes the requests of a run, each time about new images.
            names: Of the engines; all by default.
        """
        timed = self.serve(make(), watched=not self._watch_apart, names=names)
        if not self._watch_apart:
            return timed, timed
        asks = make()
        # Nobody's turn: else the same engine would go first in every run that is timed.
        return timed, {
            name: self.engines[name].run("images", asks=asks, watched=True) for name in timed
        }

    def layer_seconds(self, batch: int, tokens: int) -> float:
        """What a layer takes stock vLLM for text prompts of ``tokens`` tokens each."""
        served = self.engines[STOCK].run("text", batch=batch, tokens=tokens, max_tokens=1)
        seconds: float = served["seconds"]
        return seconds / self.shape.layers

    def decode_step_seconds(self, batch: int, tokens: int, max_tokens: int) -> float:
        """What a decode step takes stock vLLM after text prompts of ``tokens`` tokens each."""
        command = {"batch": batch, "tokens": tokens, "max_tokens": max_tokens}
        return median(self.engines[STOCK].run("text", **command)["decode_step_seconds"])


def summary(figures: Mapping[str, list[float]], with_spread: Sequence[str]) -> Row:
    """Median of each figure; for those named also ``_spread``, least and greatest."""
    medians: Row = {name: median(values) for name, values in figures.items()}
    return medians | {
        f"{name}_spread": [min(figures[name]), max(figures[name])] for name in with_spread
    }
