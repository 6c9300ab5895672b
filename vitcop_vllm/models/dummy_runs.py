"""Pruned dummy data for vLLM's start-up runs, which compile the model and measure memory."""

import numpy as np
import torch

from vitcop_vllm.pruning.plan import (
    RequestPlan,
    VisualSpan,
    VisualTokenCounts,
    dummy_ratio,
    plan_counts,
)
from vitcop_vllm.pruning.settings import PruningSettings
from vitcop_vllm.worker.planner import StepPlanner
from vitcop_vllm.worker.step import StagedForward


def dummy_counts(
    settings: PruningSettings, num_layers: int, encoder_tokens: int
) -> VisualTokenCounts | None:
    """Counts of a dummy image; ``None`` if the settings prune no image.

    Args:
        settings: The operator's settings.
        num_layers: L, decoder layers.
        encoder_tokens: V, the image's visual tokens from the encoder.
    """
    ratio = dummy_ratio(settings, num_layers)
    counts = plan_counts(settings, ratio, num_layers, encoder_tokens)
    return counts if counts.is_pruned else None


def dummy_step(
    counts: VisualTokenCounts, num_rows: int, device: torch.device, *, find_prompts: bool
) -> tuple[StagedForward, torch.Tensor] | None:
    """A prefill of as many images as fit into a step, and cluster labels of its rows.

    Args:
        counts: Counts of each image.
        num_rows: Maximum rows of the step.
        device: Device of the returned tensors.
        find_prompts: Whether the selector reads the question, and so the rows of a prompt.

    Returns:
        ``None`` if Stages II and III drop no tokens, or if no image fits.
    """
    n1 = counts.stages[0]
    num_images = num_rows // n1
    names = [str(number) for number in range(num_images)]
    planner = StepPlanner(device, find_prompts=find_prompts)
    for name in names:
        planner.track(name, RequestPlan((VisualSpan(0, counts),)), n1)
    starts = np.zeros(num_images, dtype=np.int64)
    step = planner.plan_step(names, starts, starts + n1)
    if step is None or step.forward is None:
        return None
    labels = torch.arange(num_images * n1, device=device) % n1 % max(counts.centres, 1)
    return step.forward, labels
