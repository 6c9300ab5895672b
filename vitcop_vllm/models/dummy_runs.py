"""Pruned dummy data for the runs in which vLLM compiles and measures memory before it serves."""

import torch

from vitcop_vllm.pruning.plan import (
    RequestPlan,
    VisualSpan,
    VisualTokenCounts,
    dummy_ratio,
    plan_counts,
)
from vitcop_vllm.pruning.settings import PruningSettings
from vitcop_vllm.worker.step import ScheduledRequest, StagedForward, build_step


def dummy_counts(
    settings: PruningSettings, num_layers: int, encoder_tokens: int
) -> VisualTokenCounts | None:
    """Counts of a dummy image; ``None`` where the settings prune no image.

    Args:
        settings: The operator's.
        num_layers: L, decoder layers.
        encoder_tokens: V, the image's visual tokens from the encoder.
    """
    ratio = dummy_ratio(settings, num_layers)
    counts = plan_counts(settings, ratio, num_layers, encoder_tokens)
    return counts if counts.is_pruned else None


def dummy_step(
    counts: VisualTokenCounts, num_rows: int, device: torch.device
) -> tuple[StagedForward, list[torch.Tensor]] | None:
    """A prefill of as many images as fit into a step, and their cluster labels.

    Args:
        counts: Of each image.
        num_rows: Most rows of the step.
        device: Where the tensors are needed.

    Returns:
        ``None`` where no stage after the first drops tokens, or no image fits.
    """
    n1 = counts.stages[0]
    request = ScheduledRequest(RequestPlan((VisualSpan(0, counts),)), 0, n1, n1)
    step = build_step([request] * (num_rows // n1), device)
    if step is None or step.forward is None:
        return None
    labels = torch.arange(n1, device=device) % max(counts.centres, 1)
    return step.forward, [labels] * (num_rows // n1)
