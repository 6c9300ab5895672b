"""Prefill: concurrent requests with answers of one token.

``ideal``: stock vLLM's encoder time, plus the rest of stock's time scaled by the plan's tokens,
averaged over layers. ``vs_ideal``: that time over ours; 1 or more meets the ideal.
``vs_stock_rows``: stock's encoder time plus, for each layer, stock's time for text prompts of as
many rows, over our time: kernels that are slow for few rows count on both sides.
``stages_share``: seconds of Stages I to III over stock's prefill. ``vs_peer``: the peer's time over
ours, at the same layer average. ``vs_scaled_down``: stock's time over ours, for images that
are scaled down to about as many visual tokens as we keep. ``vs_evs``: over ours, the time of stock
vLLM that prunes videos to as many tokens.

All times of a row come from the same round, because the machine's speed varies between rounds.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

from benchmarks.checkpoint import AnySizeShape
from benchmarks.engines import OURS, STOCK
from benchmarks.ideals import ideal_prefill
from benchmarks.requests import QUESTION, ImageRequest, filler_text
from benchmarks.rounds import SCALED_DOWN, Rounds, Row, over_ours, summary
from benchmarks.shapes import Shape, family_of, scaled_down_size

RATIOS = ("2/3", "7/9", "8/9")
LONG_RATIOS = ("2/3", "8/9")
"""Ratios for prompts with several images or a long text."""

IMAGES = (1, 4, 8)
"""Numbers of images in a prompt."""

TEXT_TOKENS = (1024, 2048)
"""Lengths of the text beside one image."""

Case = dict[str, Any]
"""Arguments of :func:`measure_prefill`."""

IMAGE_CASES: list[Case] = [
    {"ratio": ratio, "images": images} for images in IMAGES for ratio in LONG_RATIOS
]
LONG_TEXT_CASES: list[Case] = [
    {"ratio": ratio, "question": filler_text(tokens)}
    for tokens in TEXT_TOKENS
    for ratio in LONG_RATIOS
]
VIDEO_CASES: list[Case] = [{"ratio": ratio} for ratio in ("0", *LONG_RATIOS)]


def prefill_cases(shape: Shape, batches: Sequence[int]) -> list[Case]:
    sizes = family_of(shape).image_sizes
    if not sizes:
        return [{"ratio": ratio, "batch": batch} for batch in batches for ratio in RATIOS]
    return [
        {"ratio": ratio, "batch": batch, "image_size": size}
        for size in sizes
        for batch in batches
        for ratio in ("0", *RATIOS)
    ]


def measure_prefill(
    rounds: Rounds,
    ratio: str,
    batch: int = 1,
    *,
    image_size: int | None = None,
    images: int | None = None,
    question: str = QUESTION,
) -> list[Row]:
    """Prefill of ``batch`` requests at once: one row for each engine that prunes, and one for
    :data:`SCALED_DOWN` if the model supports images of any size.

    Args:
        rounds: The engines.
        ratio: A fraction.
        batch: Number of requests.
        image_size: Height and width of the images; default: as the rounds have them.
        images: Number of images in a prompt; default: as the rounds have them.
        question: The text.
    """
    value = float(Fraction(ratio))
    rounds = rounds.showing(images or rounds.images, image_size, is_video=rounds.is_video)
    images, shape, plans = rounds.images, rounds.shape, rounds.plans(value)
    measured: dict[str, list[dict[str, float]]] = defaultdict(list)
    text = 0

    def requests(size: int = shape.image_size) -> list[ImageRequest]:
        made = rounds.new_requests(batch, value, 1, question=question)
        return [replace(request, image_size=size) for request in made]

    engines = rounds.engines_at(ratio)
    rounds.serve(requests(), *engines)  # caches, allocators and lazy kernels
    smaller = None
    if isinstance(shape, AnySizeShape) and value and not rounds.is_video:
        smaller = scaled_down_size(shape, plans[OURS].average)
    for _ in range(rounds.number):
        timed, profiled = rounds.serve_profiled(requests, *engines)
        runs = {name: (timed[name], profiled[name]) for name in engines}
        stock, encoder = timed[STOCK]["seconds"], profiled[STOCK]["encoder_seconds"]
        text = timed[STOCK]["prompt_tokens"][0] - rounds.visual_tokens
        layer = {
            tokens: rounds.layer_seconds(batch, text + images * tokens)
            for tokens in {tokens for plan in plans.values() for tokens in plan.counts.stages}
        }
        if smaller is not None:
            scaled, scaled_profiled = rounds.serve_profiled(partial(requests, smaller), STOCK)
            runs[SCALED_DOWN] = scaled[STOCK], scaled_profiled[STOCK]
        for name, (run, profile) in runs.items():
            seconds = run["seconds"]
            figures = {
                # Prompts of stock vLLM hold only the tokens that it keeps.
                "average_tokens": (run["prompt_tokens"][0] - text) / images,
                "stock_ms": stock * 1e3,
                "ours_ms": seconds * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "encoder_ms": profile["encoder_seconds"] * 1e3,
                "speed_up": stock / seconds,
            }
            if name in plans:
                plan = plans[name]
                ideal = ideal_prefill(stock, encoder, plan.share(text, images))
                stages = zip(plan.layers, plan.counts.stages, strict=True)
                rows = encoder + sum(layers * layer[tokens] for layers, tokens in stages)
                figures |= {
                    "average_tokens": plan.average,
                    "ideal": stock / ideal,
                    "vs_ideal": ideal / seconds,
                    "vs_stock_rows": rows / seconds,
                    "stages_share": profile["stage_seconds"] / stock,
                }
            measured[name].append(figures)
        measured[OURS][-1] |= over_ours({name: run["seconds"] for name, (run, _) in runs.items()})
    shown = "frames" if rounds.is_video else "images"
    conditions: Row = {"ratio": ratio, "batch": batch, shown: images, "text_tokens": text}
    if image_size is not None:
        conditions["image_size"] = image_size
    return [
        conditions
        | {"selector": name}
        | ({"visual_tokens": list(plans[name].counts.stages)} if name in plans else {})
        | summary(rows, "speed_up", "vs_ideal", "vs_peer", "vs_scaled_down", "vs_evs")
        for name, rows in measured.items()
        if name != STOCK
    ]
