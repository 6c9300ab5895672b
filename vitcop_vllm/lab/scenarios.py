"""What the bench has both engines do, and the figures it takes.

Every figure is a median over rounds; with ``_spread``, the least and the greatest.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from math import ceil
from statistics import median
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from vitcop_vllm.demo.checkpoint import LlavaShape
from vitcop_vllm.lab.engines import Ask, EngineProcess, Result
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

PREFILL_RATIOS = {"2/3": 2 / 3, "7/9": 7 / 9, "8/9": 8 / 9}
DECODE_RATIOS = {"0": 0.0, "8/9": 8 / 9}
TURN_RATIOS = {"2/3": 2 / 3, "8/9": 8 / 9}
CAPACITY_RATIOS = {"0": 0.0, "8/9": 8 / 9}

PROMPT = "USER: <image>\nWhat is in this picture? Answer in one word. ASSISTANT:"
NEXT_QUESTION = "And what is it made of?"
ANSWER_TOKENS = 16
"""Of a first turn, and of the requests that are to share a KV cache."""

UNPRUNED_FIT = 8
"""Unpruned requests for which stock vLLM has blocks where KV memory is the limit; at 8/9 there
is memory for some 40."""

KV_BLOCK = 128
"""Tokens: stock vLLM's block on a CPU, and a multiple of all others."""

Argument = TypeVar("Argument")


class Rounds:
    """Both engines, who take turns, and pictures that neither has seen.

    Args:
        stock, ours: The engines.
        shape: Of their model.
        number: Rounds of each scenario; iterating counts them on ``bar``.
    """

    def __init__(
        self, stock: EngineProcess, ours: EngineProcess, shape: LlavaShape, number: int, bar: tqdm
    ) -> None:
        self.stock, self.ours, self.shape = stock, ours, shape
        self._number, self._bar = number, bar
        # One seed serves both engines once: no cache ever knows a picture.
        self._seeds = count(1)
        self._ours_first = True

    def __iter__(self) -> Iterator[int]:
        for number in range(self._number):
            yield number
            self._bar.update()

    def pictures(self, number: int) -> list[int]:
        """Seeds of new pictures."""
        return [next(self._seeds) for _ in range(number)]

    def asks(self, number: int, ratio: float, max_tokens: int) -> list[Ask]:
        """The same question about new pictures."""
        return [Ask(PROMPT, picture, ratio, max_tokens) for picture in self.pictures(number)]

    def both(
        self,
        serve: Callable[[EngineProcess, Argument], Result],
        for_stock: Argument,
        for_ours: Argument,
    ) -> tuple[Result, Result]:
        """Results of stock vLLM and of ours; who goes first changes with every call."""
        self._ours_first = not self._ours_first
        if self._ours_first:
            ours = serve(self.ours, for_ours)
            return serve(self.stock, for_stock), ours
        return serve(self.stock, for_stock), serve(self.ours, for_ours)

    def serve(self, asks: list[Ask], clients: int | None = None) -> tuple[Result, Result]:
        """The same requests on both, at most ``clients`` at a time."""
        return self.both(partial(_serve, clients=clients), asks, asks)

    def layer_seconds(self, batch: int, tokens: int) -> float:
        """What a layer takes stock vLLM for text prompts of ``tokens`` tokens each."""
        seconds: float = self.stock.run("text", batch=batch, tokens=tokens)["seconds"]
        return seconds / self.shape.layers


def _serve(engine: EngineProcess, asks: list[Ask], clients: int | None) -> Result:
    return engine.run("pictures", asks=asks, clients=clients)


def summary(
    figures: dict[str, list[float]], with_spread: Sequence[str]
) -> dict[str, float | list[float]]:
    """Median of each figure; for those named also ``_spread``, least and greatest."""
    medians: dict[str, float | list[float]] = {
        name: median(values) for name, values in figures.items()
    }
    return medians | {
        f"{name}_spread": [min(figures[name]), max(figures[name])] for name in with_spread
    }


def _plan(shape: LlavaShape, ratio: float) -> tuple[VisualTokenCounts, tuple[int, int]]:
    """Visual tokens per stage, and where the stages begin, with default settings."""
    settings = PruningSettings()
    counts = plan_counts(settings, ratio, shape.layers, shape.visual_tokens)
    return counts, settings.boundaries(shape.layers)


def measure_prefill(rounds: Rounds, ratio: float, batch: int) -> dict[str, Any]:
    """Prefill (one answer token) of ``batch`` requests that arrive at once."""
    shape = rounds.shape
    counts, (shallow, deep) = _plan(shape, ratio)
    layers = (shallow, deep - shallow, shape.layers - deep)
    visual_average = counts.layer_average((shallow, deep), shape.layers)
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in rounds:
        stock, ours = rounds.serve(rounds.asks(batch, ratio, 1))
        encoder = stock["encoder_seconds"]
        text = stock["prompt_tokens"][0] - shape.visual_tokens
        share = (text + visual_average) / (text + shape.visual_tokens)
        ideal = encoder + (stock["seconds"] - encoder) * share
        kernels = encoder + sum(
            number * rounds.layer_seconds(batch, text + visual)
            for number, visual in zip(layers, counts.stages, strict=True)
        )
        for figure, value in {
            "stock_ms": stock["seconds"] * 1e3,
            "ours_ms": ours["seconds"] * 1e3,
            "stock_encoder_ms": encoder * 1e3,
            "speed_up": stock["seconds"] / ours["seconds"],
            "ideal": stock["seconds"] / ideal,
            "vs_ideal": ideal / ours["seconds"],
            "vs_stock_rows": kernels / ours["seconds"],
            "stages_share": ours["stage_seconds"] / stock["seconds"],
        }.items():
            figures[figure].append(value)
    return summary(figures, ["vs_ideal"])


def measure_decode(rounds: Rounds, ratio: float, batch: int, tokens: int) -> dict[str, Any]:
    """Latency of a decode step, and of the whole, ours over stock."""
    figures: dict[str, list[float]] = defaultdict(list)
    same = True
    for _ in rounds:
        stock, ours = rounds.serve(rounds.asks(batch, ratio, tokens))
        step = median(stock["decode_step_seconds"])
        figures["decode_latency"].append(median(ours["decode_step_seconds"]) / step)
        figures["throughput"].append(stock["seconds"] / ours["seconds"])
        figures["stock_decode_step_ms"].append(step * 1e3)
        same &= stock["tokens"] == ours["tokens"]
    return summary(figures, ["decode_latency", "throughput"]) | {"same_tokens": same}


def second_turn(engine: EngineProcess, ask: Ask) -> Result:
    """Serve ``ask``, then the next question about the same picture, of which the result is."""
    (answer,) = engine.run("pictures", asks=[ask])["answers"]
    prompt = f"{ask.prompt}{answer} USER: {NEXT_QUESTION} ASSISTANT:"
    return engine.run("pictures", asks=[replace(ask, prompt=prompt, max_tokens=1, letters=False)])


def measure_turns(rounds: Rounds, ratio: float) -> dict[str, Any]:
    """Time to first token of a second turn, and prompt tokens that it reuses."""

    def converse() -> tuple[Result, Result]:
        (picture,) = rounds.pictures(1)
        ask = Ask(PROMPT, picture, ratio, ANSWER_TOKENS, letters=True)
        return rounds.both(second_turn, ask, ask)

    converse()  # kernels that are lazy about prompts half of which is cached
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in rounds:
        stock, ours = converse()
        for name, result in (("stock", stock), ("ours", ours)):
            figures[f"{name}_ttft_ms"].append(result["first_token_seconds"][0] * 1e3)
            figures[f"{name}_prompt_tokens"].append(result["prompt_tokens"][0])
            figures[f"{name}_reused_tokens"].append(result["reused_tokens"][0])
        figures["ttft"].append(figures["ours_ttft_ms"][-1] / figures["stock_ttft_ms"][-1])
    return summary(figures, ["ttft"])


def ideal_capacity(budget: int, longest: float, num_layers: int) -> float:
    """Requests whose KV fits, were there no blocks and no whole requests.

    Args:
        budget: KV slots times layers.
        longest: Tokens of a request at its longest, averaged over layers.
        num_layers: L, decoder layers.
    """
    return budget / (longest * num_layers)


def kv_budget(unpruned: int, num_layers: int) -> int:
    """KV slots times layers that hold ``UNPRUNED_FIT`` requests of ``unpruned`` tokens each."""
    return UNPRUNED_FIT * ceil(unpruned / KV_BLOCK) * KV_BLOCK * num_layers


def measure_capacity(rounds: Rounds, ratio: float) -> dict[str, Any]:
    """The most requests that run at once, unpreempted, in KV memory of the same size."""
    shape = rounds.shape
    visual, layers = shape.visual_tokens, shape.layers
    counts, boundaries = _plan(shape, ratio)
    probe = rounds.stock.run("pictures", asks=rounds.asks(1, ratio, 1))
    # An answer's last token is not given back to the decoder.
    text = probe["prompt_tokens"][0] - visual + ANSWER_TOKENS - 1
    budget = kv_budget(text + visual, layers)
    stock_ideal = ideal_capacity(budget, text + visual, layers)
    ideal = ideal_capacity(budget, text + counts.layer_average(boundaries, layers), layers)

    def serve(engine: EngineProcess, requests: int) -> Result:
        asks = rounds.asks(requests, ratio, ANSWER_TOKENS)
        return engine.run("capacity", asks=asks, budget=budget)

    figures: dict[str, list[float]] = defaultdict(list)
    for _ in rounds:
        stock, ours = rounds.both(serve, ceil(1.25 * stock_ideal), ceil(1.25 * ideal))
        figures["stock_most"].append(stock["most"])
        figures["most"].append(ours["most"])
        figures["stock_vs_ideal"].append(stock["most"] / stock_ideal)
        figures["vs_ideal"].append(ours["most"] / ideal)
        figures["preemptions"].append(ours["preemptions"])
    fixed = {"budget": budget, "stock_ideal": stock_ideal, "ideal": ideal}
    return summary(figures, ["vs_ideal"]) | fixed
