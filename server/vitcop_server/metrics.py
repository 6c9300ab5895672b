"""Counters of the API server, on ``/metrics`` beside vLLM's metrics."""

from collections.abc import Sequence

from prometheus_client import Counter

from vitcop_vllm.pruning.plan import STAGES, VisualTokenCounts

_BOUNDS = (0.5, 0.7, 0.8, 0.9, 1.0)

REQUESTS = Counter("vitcop_requests", "Accepted requests, by pruning ratio.", ["ratio"])
TOKENS_KEPT = Counter(
    "vitcop_visual_tokens_kept",
    "Visual tokens of prompts that a Stage keeps, by Stage: I, II or III.",
    ["stage"],
)
TOKENS_DROPPED = Counter(
    "vitcop_visual_tokens_dropped",
    "Visual tokens of prompts that a Stage drops, by Stage: I, II or III.",
    ["stage"],
)
RATIO_ERRORS = Counter(
    "vitcop_ratio_errors",
    "Requests refused because of the value or the place of their pruning ratio.",
)


def ratio_bucket(ratio: float, images: Sequence[VisualTokenCounts]) -> str:
    """The label of a ratio: ``none`` without images, ``0``, or a range such as ``0.5-0.7``."""
    if not images:
        return "none"
    if ratio == 0:
        return "0"
    lower = 0.0
    for upper in _BOUNDS:
        if ratio < upper:
            break
        lower = upper
    return f"{lower:g}-{upper:g}"


def count_request(ratio: float, images: Sequence[VisualTokenCounts]) -> None:
    """Count a request after vLLM has rendered its prompt."""
    REQUESTS.labels(ratio_bucket(ratio, images)).inc()
    for number, stage in enumerate(STAGES):
        kept = sum(image.stages[number] for image in images)
        encoder = sum(image.encoder for image in images)
        TOKENS_KEPT.labels(stage).inc(kept)
        TOKENS_DROPPED.labels(stage).inc(encoder - kept)
