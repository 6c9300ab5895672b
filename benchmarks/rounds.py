"""Rounds in which engines take turns at the same work, and medians over them."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any, Self, TypeVar

from benchmarks.engines import EVS, EVS_RATIO, OURS, PEER, STOCK, EngineName, EngineProcess
from benchmarks.ideals import ImagePlan
from benchmarks.measured_engine import Result
from benchmarks.requests import QUESTION, ImageRequest, user_turn
from benchmarks.shapes import Shape, family_of
from vitcop_vllm.pruning.settings import SelectorName

Row = dict[str, Any]
"""A table's row: conditions, medians over rounds, and ``_spread`` of some medians."""

SCALED_DOWN = "smaller image"
"""Selector of rows in which stock vLLM gets images scaled down to about as many visual tokens as
pruning keeps. This alternative to pruning also saves encoder time, and loses detail. Models with
tiles have few numbers of tokens to choose from: ``average_tokens`` says which."""

Name = TypeVar("Name")


class Turns:
    """Calls functions one after the other; every time another function goes first."""

    def __init__(self) -> None:
        self._turn = count()

    def run(self, runs: Mapping[Name, Callable[[], Result]]) -> dict[Name, Result]:
        """Result of each function, by name."""
        order = list(runs)
        first = next(self._turn) % len(order)
        results = {name: runs[name]() for name in (*order[first:], *order[:first])}
        return {name: results[name] for name in order}


class Rounds:
    """Engines that take turns, each time with new images, or with a new video.

    Attributes:
        images: Number of images in a prompt, or of frames of its video.
        is_video: Whether prompts have a video.

    Args:
        engines: Engines by name; at least stock vLLM and ours.
        shape: Shape of their model.
        number: Number of rounds in each scenario.
        profile_apart: Time the encoder and the stages in separate runs. On a GPU, timing them
            waits for the device, which slows the rest. On a CPU it only reads a clock.
    """

    def __init__(
        self,
        engines: Mapping[EngineName, EngineProcess],
        shape: Shape,
        number: int,
        *,
        profile_apart: bool = False,
    ) -> None:
        self.engines, self.shape, self.number = engines, shape, number
        self.images, self.is_video = 1, False
        self._profile_apart = profile_apart
        self._seeds = count(1)  # a seed is used once, so no cache holds its image
        self._turns = Turns()

    def showing(self, images: int, size: int | None = None, *, is_video: bool = False) -> Self:
        """A copy whose prompts have other images or videos.

        Args:
            images: The attribute.
            size: Height and width of the images, in pixels; default: as before.
            is_video: The attribute.
        """
        rounds = copy(self)
        rounds.images, rounds.is_video = images, is_video
        if size is not None:
            rounds.shape = replace(self.shape, image_size=size)
        return rounds

    def engines_at(self, ratio: str) -> list[EngineName]:
        """Engines that can keep as many tokens as pruning with this ratio, and stock vLLM."""
        evs = self.is_video and ratio == EVS_RATIO
        return [name for name in self.engines if name != EVS or evs]

    @property
    def visual_tokens(self) -> int:
        """Unpruned visual tokens of a prompt."""
        return self.images * self.shape.visual_tokens

    def plans(self, ratio: float) -> dict[SelectorName, ImagePlan]:
        """Plan of each image, by selector of the engines that prune."""
        selectors = (name for name in (OURS, PEER) if name in self.engines)
        return {name: ImagePlan.of(self.shape, ratio, name) for name in selectors}

    def new_requests(
        self, number: int, ratio: float, max_tokens: int, *, question: str = QUESTION
    ) -> list[ImageRequest]:
        """``number`` requests with the same question, each about new images."""
        family = family_of(self.shape)
        marks = (1, family.video_marker) if self.is_video else (self.images, family.image_marker)
        prompt = user_turn(question, *marks)
        return [
            ImageRequest(
                prompt,
                tuple(next(self._seeds) for _ in range(self.images)),
                ratio,
                max_tokens,
                image_size=self.shape.image_size,
                is_video=self.is_video,
            )
            for _ in range(number)
        ]

    def in_turn(self, run: Callable[[EngineName], Result], *names: EngineName) -> dict[Any, Result]:
        """Results of ``run`` for the named engines; all by default."""
        return self._turns.run({name: partial(run, name) for name in names or self.engines})

    def serve(
        self, requests: Sequence[ImageRequest], *names: EngineName, profile: bool = False
    ) -> dict[EngineName, Result]:
        """Serve the same requests on the named engines; all by default."""

        def run(name: EngineName) -> Result:
            return self.engines[name].run("images", requests=requests, profile=profile)

        return self.in_turn(run, *names)

    def serve_profiled(
        self, make: Callable[[], Sequence[ImageRequest]], *names: EngineName
    ) -> tuple[dict[EngineName, Result], dict[EngineName, Result]]:
        """Results of a timed run, and of a run that profiles encoder and stages.

        Args:
            make: Makes a run's requests, about new images.
            *names: Engines; all by default.
        """
        timed = self.serve(make(), *names, profile=not self._profile_apart)
        if not self._profile_apart:
            return timed, timed
        requests = make()
        # Not as a turn: otherwise the same engine would go first in every timed run.
        return timed, {
            name: self.engines[name].run("images", requests=requests, profile=True)
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


def over_ours(figures: Mapping[Any, float]) -> dict[str, float]:
    """``vs_peer``, ``vs_evs`` and ``vs_scaled_down``: figures of alternatives over ours."""
    others = {"vs_peer": PEER, "vs_evs": EVS, "vs_scaled_down": SCALED_DOWN}
    return {
        title: figures[name] / figures[OURS] for title, name in others.items() if name in figures
    }


def summary(measured: Sequence[Mapping[str, float]], *with_spread: str) -> Row:
    """Medians over rounds, and ``_spread``, [minimum, maximum], of the named figures."""
    figures = {name: [row[name] for row in measured] for name in measured[0]}
    spreads = {f"{name}_spread": figures[name] for name in with_spread if name in figures}
    medians: Row = {name: median(values) for name, values in figures.items()}
    return medians | {name: [min(values), max(values)] for name, values in spreads.items()}
