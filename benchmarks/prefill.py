"""Prefill: requests that arrive at once and get one token, with short and long prompts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from benchmarks.asks import QUESTION, text_of
from benchmarks.engines import OURS, PEER, STOCK
from benchmarks.ideals import ImagePlan, ideal_prefill
from benchmarks.measured_engine import Result
from benchmarks.qwen_checkpoint import QwenShape
from benchmarks.rounds import Rounds, Row, summary
from benchmarks.shapes import Shape

_WITH_SPREAD = ("speed_up", "vs_ideal", "vs_peer", "vs_scaled_down")

RATIOS = ("2/3", "7/9", "8/9")
LONG_RATIOS = ("2/3", "8/9")
"""Of prompts with many images, or with much text."""

IMAGES = (1, 4, 8)
"""In one prompt."""

TEXT_TOKENS = (1024, 2048)
"""Beside one image."""

IMAGE_SIZES = (448, 1344)
"""Height and width in pixels, where a model takes images of any."""

SCALED_DOWN = "max_pixels"
"""Stands for a selector in rows of stock vLLM with images scaled down to as many visual tokens as
pruning leaves on average: what people do without pruning. It saves work of the encoder, which
pruning does not, and sees less of an image."""


def cases(shape: Shape, batches: Sequence[int]) -> list[tuple[Any, ...]]:
    """Ratio, requests at once, and, where a model takes images of any, their size."""
    if isinstance(shape, QwenShape):
        ratios = ("0", *RATIOS)
        return [(r, batch, size) for size in IMAGE_SIZES for batch in batches for r in ratios]
    return [(r, batch) for batch in batches for r in RATIOS]


def measure_prefill(
    rounds: Rounds,
    ratio: str,
    batch: int,
    image_size: int | None = None,
    *,
    images: int = 1,
    question: str = QUESTION,
) -> list[Row]:
    """Prefill of ``batch`` requests at once, one row for each engine that prunes.

    Ideal times are taken within the round: the machine may be another one in the next.
    """
    value = float(Fraction(ratio))
    if image_size is not None:
        rounds = rounds.with_image_size(image_size)
        rounds.serve(rounds.asks(batch, value, 1))  # lazy kernels
    shape = rounds.shape
    plans = {name: ImagePlan.of(shape, value, name) for name in rounds.selectors}
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in plans}
    if isinstance(shape, QwenShape) and value:
        figures[SCALED_DOWN] = defaultdict(list)
    text = 0
    for _ in rounds:
        timed, watched = rounds.serve_watched(
            lambda: rounds.asks(batch, value, 1, images=images, question=question)
        )
        stock, encoder = timed[STOCK]["seconds"], watched[STOCK]["encoder_seconds"]
        text = timed[STOCK]["prompt_tokens"][0] - images * shape.visual_tokens
        rows = {
            tokens: rounds.layer_seconds(batch, text + images * tokens)
            for tokens in {tokens for plan in plans.values() for tokens in plan.counts.stages}
        }
        for name, plan in plans.items():
            seconds = timed[name]["seconds"]
            ideal = ideal_prefill(stock, encoder, plan.share(text, images))
            kernels = encoder + sum(
                layers * rows[tokens]
                for layers, tokens in zip(plan.layers, plan.counts.stages, strict=True)
            )
            for figure, measured in {
                "average_tokens": plan.average,
                "stock_ms": stock * 1e3,
                "pruned_ms": seconds * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "encoder_ms": watched[name]["encoder_seconds"] * 1e3,
                "speed_up": stock / seconds,
                "ideal": stock / ideal,
                "vs_ideal": ideal / seconds,
                "vs_stock_rows": kernels / seconds,
                "stages_share": watched[name]["stage_seconds"] / stock,
            }.items():
                figures[name][figure].append(measured)
        if PEER in plans:
            # Of the same layer average: what is left over is what choosing late costs.
            figures[OURS]["vs_peer"].append(timed[PEER]["seconds"] / timed[OURS]["seconds"])
        if isinstance(shape, QwenShape) and SCALED_DOWN in figures:
            scaled = _scaled_down(rounds, batch, shape.max_pixels(plans[OURS].average))
            seconds = scaled["seconds"]
            for figure, measured in {
                "average_tokens": scaled["prompt_tokens"][0] - text,
                "stock_ms": stock * 1e3,
                "pruned_ms": seconds * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "encoder_ms": scaled["encoder_seconds"] * 1e3,
                "speed_up": stock / seconds,
            }.items():
                figures[SCALED_DOWN][figure].append(measured)
            figures[OURS]["vs_scaled_down"].append(seconds / timed[OURS]["seconds"])
    conditions = {"ratio": ratio, "batch": batch, "images": images, "text_tokens": text}
    if image_size is not None:
        conditions["image_size"] = image_size
    stages: dict[str, Row] = {
        name: {"visual_tokens": list(plan.counts.stages)} for name, plan in plans.items()
    }
    return [
        conditions
        | {"selector": name}
        | stages.get(name, {})
        | summary(row, [figure for figure in _WITH_SPREAD if figure in row])
        for name, row in figures.items()
    ]


def _scaled_down(rounds: Rounds, batch: int, max_pixels: int) -> Result:
    """Prefill by stock vLLM of images scaled down, and the encoder's seconds."""
    timed, watched = rounds.serve_watched(
        lambda: [replace(ask, max_pixels=max_pixels) for ask in rounds.asks(batch, 0.0, 1)],
        names=(STOCK,),
    )
    return {**timed[STOCK], "encoder_seconds": watched[STOCK]["encoder_seconds"]}


def measure_images(rounds: Rounds, ratio: str, images: int) -> list[Row]:
    """Prefill of one request about several images."""
    rounds.serve(rounds.asks(1, float(Fraction(ratio)), 1, images=images))  # lazy kernels
    return measure_prefill(rounds, ratio, 1, images=images)


def measure_long_text(rounds: Rounds, ratio: str, tokens: int) -> list[Row]:
    """Prefill of one request about an image, with some ``tokens`` tokens of text."""
    question = text_of(tokens)
    rounds.serve(rounds.asks(1, float(Fraction(ratio)), 1, question=question))  # lazy kernels
    return measure_prefill(rounds, ratio, 1, question=question)
