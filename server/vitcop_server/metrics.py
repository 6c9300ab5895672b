"""Counters of the API server, on ``/metrics`` beside vLLM's metrics."""

from collections.abc import Mapping, Sequence

from prometheus_client import Counter, Gauge

from vitcop_vllm.pruning.plan import STAGES, VisualTokenCounts

_BOUNDS = (0.5, 0.7, 0.8, 0.9, 1.0)

REQUESTS = Counter("vitcop_requests", "Accepted requests, by pruning ratio.", ["ratio"])
DEFAULT_RATIO = Gauge(
    "vitcop_default_ratio",
    "Pruning ratio of a request that names none and arrives now.",
    multiprocess_mode="mostrecent",
)
RAISED = Counter(
    "vitcop_requests_raised",
    "Accepted requests with images that name no ratio and got more than pruning.default_ratio.",
)
TOKENS_KEPT = Counter(
    "vitcop_visual_tokens_kept",
    "Visual tokens of prompts that a Stage keeps, by Stage: I, II or III, and by modality: image "
    "or video.",
    ["stage", "modality"],
)
TOKENS_DROPPED = Counter(
    "vitcop_visual_tokens_dropped",
    "Visual tokens of prompts that a Stage drops, by Stage: I, II or III, and by modality: image "
    "or video.",
    ["stage", "modality"],
)
ITEMS = Counter(
    "vitcop_images",
    "Images of prompts, and frames of their videos as the encoder computes them, by modality: "
    "image or video.",
    ["modality"],
)
RATIO_ERRORS = Counter(
    "vitcop_ratio_errors",
    "Requests refused because of the value or the place of their pruning ratio.",
)


def ratio_bucket(ratio: float, has_images: bool) -> str:
    """The label of a ratio: ``none`` without images, ``0``, or a range such as ``0.5-0.7``."""
    if not has_images:
        return "none"
    if ratio == 0:
        return "0"
    lower = 0.0
    for upper in _BOUNDS:
        if ratio < upper:
            break
        lower = upper
    return f"{lower:g}-{upper:g}"


def count_request(
    ratio: float, counts: Mapping[str, Sequence[VisualTokenCounts]], is_raised: bool
) -> None:
    """Count a request after vLLM has rendered its prompt.

    Args:
        ratio: Its pruning ratio.
        is_raised: Whether load has raised the ratio above the operator's default.
        counts: Counts of its images, and of the frames of its videos, by modality.
    """
    has_images = any(counts.values())
    REQUESTS.labels(ratio_bucket(ratio, has_images)).inc()
    RAISED.inc(is_raised and has_images)
    for modality, images in counts.items():
        ITEMS.labels(modality).inc(len(images))
        encoder = sum(image.encoder for image in images)
        for number, stage in enumerate(STAGES):
            kept = sum(image.stages[number] for image in images)
            TOKENS_KEPT.labels(stage, modality).inc(kept)
            TOKENS_DROPPED.labels(stage, modality).inc(encoder - kept)
