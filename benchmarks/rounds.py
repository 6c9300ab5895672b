"""Rounds in which engines take turns at the same work, and medians over them."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any, Self, TypeVar

from benchmarks.engines import OURS, PEER, STOCK, EngineName, EngineProcess
from benchmarks.image_requests import QUESTION, ImageRequest, user_turn
from benchmarks.measured_engine import Result
from benchmarks.shapes import Shape, image_marker
from vitcop_vllm.pruning.settings import SelectorName

Row = dict[str, Any]
"""A line of a table: conditions, medians over rounds, and for some of them ``_spread``."""

Name = TypeVar("Name")


class Turns:
    """Runs a set of things in turn: another one goes first with every call."""

    def __init__(self) -> None:
        self._turn = count()

    def run(self, runs: Mapping[Name, Callable[[], Result]]) -> dict[Name, Result]:
        """Results of each run by its name."""
        order = list(runs)
        first = next(self._turn) % len(order)
        results = {name: runs[name]() for name in (*order[first:], *order[:first])}
        return {name: results[name] for name in order}


class Rounds:
    """Engines that take turns, and images that none of them has seen.

    Args:
        engines: By name; ``stock`` and ours at least.
        shape: Of their model.
        number: Rounds of each scenario.
        watch_apart: Whether encoder and stages are timed in runs of their own. On a GPU timing
            them means waiting for the device, which slows the rest. On a CPU it means some ten
            readings of a clock in a step, which take microseconds.
    """

    def __init__(
        self,
        engines: Mapping[EngineName, EngineProcess],
        shape: Shape,
        number: int,
        *,
        watch_apart: bool = False,
    ) -> None:
        self.engines, self.shape, self.number = engines, shape, number
        self._watch_apart = watch_apart
        self._seeds = count(1)  # one seed serves all engines once: no cache knows an image
        self._turns = Turns()

    @property
    def selectors(self) -> list[SelectorName]:
        """Of the engines that prune."""
        return [name for name in (OURS, PEER) if name in self.engines]

    def with_image_size(self, size: int) -> Self:
        """The same rounds with images of that height and width in pixels."""
        rounds = copy(self)
        rounds.shape = replace(self.shape, image_size=size)
        return rounds

    def new_requests(
        self,
        number: int,
        ratio: float,
        max_tokens: int,
        *,
        images: int = 1,
        question: str = QUESTION,
    ) -> list[ImageRequest]:
        """The same question ``number`` times, each time about new images."""
        prompt = user_turn(question, images, image_marker(self.shape))
        return [
            ImageRequest(
                prompt,
                tuple(next(self._seeds) for _ in range(images)),
                ratio,
                max_tokens,
                image_size=self.shape.image_size,
            )
            for _ in range(number)
        ]

    def in_turn(self, run: Callable[[EngineName], Result], *names: EngineName) -> dict[Any, Result]:
        """Results of ``run`` for each engine, or for those named."""
        return self._turns.run({name: partial(run, name) for name in names or self.engines})

    def serve(
        self, requests: Sequence[ImageRequest], *names: EngineName, watched: bool = False
    ) -> dict[EngineName, Result]:
        """The same requests on each engine, or on those named."""

        def run(name: EngineName) -> Result:
            return self.engines[name].run("images", requests=requests, watched=watched)

        return self.in_turn(run, *names)

    def serve_watched(
        self, make: Callable[[], Sequence[ImageRequest]], *names: EngineName
    ) -> tuple[dict[EngineName, Result], dict[EngineName, Result]]:
        """Results of a run that is timed, and of a run that times encoder and stages.

        Args:
            make: Makes the requests of a run, each time about new images.
            *names: Engines that serve them; all by default.
        """
        timed = self.serve(make(), *names, watched=not self._watch_apart)
        if not self._watch_apart:
            return timed, timed
        requests = make()
        # Outside of the turns: else the same engine would go first in every timed run.
        return timed, {
            name: self.engines[name].run("images", requests=requests, watched=True)
            for name in timed
        }

    def layer_seconds(self, batch: int, tokens: int) -> float:
        """Seconds of a layer in stock vLLM, for text prompts of ``tokens`` tokens each."""
        served = self.engines[STOCK].run("text", batch=batch, tokens=tokens, max_tokens=1)
        seconds: float = served["seconds"]
        return seconds / self.shape.layers

    def decode_step_seconds(self, batch: int, tokens: int, max_tokens: int) -> float:
        """Seconds of a decode step in stock vLLM, after text prompts of ``tokens`` tokens each."""
        command = {"batch": batch, "tokens": tokens, "max_tokens": max_tokens}
        return median(self.engines[STOCK].run("text", **command)["decode_step_seconds"])


def summary(measured: Sequence[Mapping[str, float]], *with_spread: str) -> Row:
    """Median of each figure over rounds; for those named also ``_spread``, least and greatest."""
    figures = {name: [row[name] for row in measured] for name in measured[0]}
    spreads = {f"{name}_spread": figures[name] for name in with_spread if name in figures}
    medians: Row = {name: median(values) for name, values in figures.items()}
    return medians | {name: [min(values), max(values)] for name, values in spreads.items()}
