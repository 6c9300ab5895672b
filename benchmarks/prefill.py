"""Prefill: requests that arrive at once and get one token.

``ideal``: the encoder at its measured cost in stock vLLM, plus the rest of stock's time scaled by
the plan's tokens, averaged over layers. ``vs_ideal``: that time over ours; 1 or more is a hit.
``vs_stock_rows``: the same encoder plus, for each layer, stock vLLM's own time for text prompts of
as many rows, over our time: a kernel that is slow for few rows is slow for both.
``stages_share``: seconds of Stages I to III over stock's prefill. ``vs_peer``: the peer's time over
ours, at the same layer average. ``vs_scaled_down``: stock's time for images that ``max_pixels``
scales to about as many visual tokens, over ours.

All of a row's times come from the same round: the machine may be slower in the next.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

from benchmarks.engines import OURS, PEER, STOCK
from benchmarks.ideals import ImagePlan, ideal_prefill
from benchmarks.image_requests import QUESTION, ImageRequest, text_of
from benchmarks.qwen_checkpoint import QwenShape
from benchmarks.rounds import Rounds, Row, summary
from benchmarks.shapes import Shape

RATIOS = ("2/3", "7/9", "8/9")
LONG_RATIOS = ("2/3", "8/9")
"""Of prompts with many images, or with much text."""

IMAGES = (1, 4, 8)
"""In one prompt."""

TEXT_TOKENS = (1024, 2048)
"""Beside one image."""

IMAGE_SIZES = (448, 1344)
"""Height and width in pixels, for models that take images of any size."""

SCALED_DOWN = "max_pixels"
"""Selector of rows in which stock vLLM gets images scaled down to about as many visual tokens as
pruning leaves: what people do without pruning. It also saves the encoder's work, which pruning does
not, and the model sees less of an image."""

Case = dict[str, Any]
"""Arguments of :func:`measure_prefill`."""


def prefill_cases(shape: Shape, batches: Sequence[int]) -> list[Case]:
    if not isinstance(shape, QwenShape):
        return [{"ratio": ratio, "batch": batch} for batch in batches for ratio in RATIOS]
    return [
        {"ratio": ratio, "batch": batch, "image_size": size}
        for size in IMAGE_SIZES
        for batch in batches
        for ratio in ("0", *RATIOS)
    ]


def image_cases() -> list[Case]:
    return [{"ratio": ratio, "images": images} for images in IMAGES for ratio in LONG_RATIOS]


def long_text_cases() -> list[Case]:
    return [
        {"ratio": ratio, "question": text_of(tokens)}
        for tokens in TEXT_TOKENS
        for ratio in LONG_RATIOS
    ]


def measure_prefill(
    rounds: Rounds,
    ratio: str,
    batch: int = 1,
    *,
    image_size: int | None = None,
    images: int = 1,
    question: str = QUESTION,
) -> list[Row]:
    """Prefill of ``batch`` requests at once: one row for each engine that prunes, and one for
    :data:`SCALED_DOWN` if the model takes images of any size."""
    value = float(Fraction(ratio))
    if image_size is not None:
        rounds = rounds.with_image_size(image_size)
    shape = rounds.shape
    plans = {name: ImagePlan.of(shape, value, name) for name in rounds.selectors}
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    text = 0

    def new_requests(max_pixels: int | None = None) -> list[ImageRequest]:
        made = rounds.new_requests(batch, value, 1, images=images, question=question)
        return [replace(request, max_pixels=max_pixels) for request in made]

    rounds.serve(new_requests())  # caches, allocators and lazy kernels
    for _ in range(rounds.number):
        timed, watched = rounds.serve_watched(new_requests)
        stock, encoder = timed[STOCK]["seconds"], watched[STOCK]["encoder_seconds"]
        text = timed[STOCK]["prompt_tokens"][0] - images * shape.visual_tokens
        layer = {
            tokens: rounds.layer_seconds(batch, text + images * tokens)
            for tokens in {tokens for plan in plans.values() for tokens in plan.counts.stages}
        }
        for name, plan in plans.items():
            seconds = timed[name]["seconds"]
            ideal = ideal_prefill(stock, encoder, plan.share(text, images))
            stages = zip(plan.layers, plan.counts.stages, strict=True)
            rows = encoder + sum(layers * layer[tokens] for layers, tokens in stages)
            figures = {
                "average_tokens": plan.average,
                "stock_ms": stock * 1e3,
                "ours_ms": seconds * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "encoder_ms": watched[name]["encoder_seconds"] * 1e3,
                "speed_up": stock / seconds,
                "ideal": stock / ideal,
                "vs_ideal": ideal / seconds,
                "vs_stock_rows": rows / seconds,
                "stages_share": watched[name]["stage_seconds"] / stock,
            }
            if name == OURS and PEER in plans:
                figures["vs_peer"] = timed[PEER]["seconds"] / seconds
            measured[name].append(figures)
        if isinstance(shape, QwenShape) and value:
            limit = shape.max_pixels(plans[OURS].average)
            scaled, scaled_watched = rounds.serve_watched(partial(new_requests, limit), STOCK)
            seconds = scaled[STOCK]["seconds"]
            measured[OURS][-1]["vs_scaled_down"] = seconds / timed[OURS]["seconds"]
            measured[SCALED_DOWN].append(
                {
                    "average_tokens": scaled[STOCK]["prompt_tokens"][0] - text,
                    "stock_ms": stock * 1e3,
                    "ours_ms": seconds * 1e3,
                    "stock_encoder_ms": encoder * 1e3,
                    "encoder_ms": scaled_watched[STOCK]["encoder_seconds"] * 1e3,
                    "speed_up": stock / seconds,
                }
            )
    conditions: Row = {"ratio": ratio, "batch": batch, "images": images, "text_tokens": text}
    if image_size is not None:
        conditions["image_size"] = image_size
    return [
        conditions
        | {"selector": name}
        | ({"visual_tokens": list(plans[name].counts.stages)} if name in plans else {})
        | summary(rows, "speed_up", "vs_ideal", "vs_peer", "vs_scaled_down")
        for name, rows in measured.items()
    ]
