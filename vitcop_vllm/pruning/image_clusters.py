"""Cluster labels of an image's kept tokens, for images of any size and for any encoder.

:func:`clustering.cluster_labels` compares all pairs of tokens, with a scale in feature distance.
This module clusters an image of many tokens in blocks, and makes the scale relative.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from vitcop_vllm.pruning.grids import Grids, token_places
from vitcop_vllm.pruning.settings import PruningSettings

MAX_CLUSTERED_TOKENS = 1024
"""Most tokens of a block. LLaVA-1.5 has 576. Beyond one block the cost is linear."""

_MIN_DISTANCE = 1e-30
"""Replaces the mean distance of 0 between tokens that are all equal."""


def label_images(
    cluster_labels: Callable[..., Tensor],
    settings: PruningSettings,
    features: Tensor,
    index: Tensor,
    grids: Grids,
    num_centres: int,
    published_scale: float | None,
) -> Tensor:
    """(B, n) int64 cluster labels in [0, K), every label with at least one token.

    Args:
        cluster_labels: ``clustering.cluster_labels`` or a kernel that equals it.
        settings: The operator's.
        features: (B, n, C) of the kept tokens.
        index: (B, n) int64, the kept tokens.
        grids: Grids of each image's tokens.
        num_centres: K, from 1 to n.
        published_scale: d_c of the model's family; ``None`` if none is published.
    """
    scale = settings.density_scale or published_scale
    if scale is None:
        scale = settings.relative_density_scale
        # Divide the features, not the scale: kernels take the scale as a Python number, and this
        # distance is on the device.
        features = features.float() / rms_distance(features)[:, None, None]
    positions, z_order = (places[index] for places in _places_on(grids, index.device))

    def label(features: Tensor, positions: Tensor, num_centres: int) -> Tensor:
        return cluster_labels(
            features,
            positions,
            num_centres,
            density_scale=scale,
            spatial_radius=settings.spatial_radius,
        )

    num_blocks = -(-index.shape[1] // MAX_CLUSTERED_TOKENS)
    if num_blocks == 1:
        return label(features, positions, num_centres)
    # Runs of equal length on the curve are compact parts of the image with equally many kept
    # tokens, so shapes do not depend on which tokens are kept.
    order = z_order.argsort(dim=1, stable=True)
    return _label_blocks(label, features, positions, order, num_blocks, num_centres)


@lru_cache(maxsize=64)
def _places_on(grids: Grids, device: torch.device) -> tuple[Tensor, Tensor]:
    """(V, 2) float32 positions and (V,) int64 Z-order of an image's tokens, on a device."""
    places = token_places(grids)
    return (
        torch.from_numpy(places.positions).to(device, non_blocking=True),
        torch.from_numpy(places.z_order).to(device, non_blocking=True),
    )


def rms_distance(features: Tensor) -> Tensor:
    """(B,) float32 root-mean-square distance between all ordered pairs of (B, n, C) rows."""
    wide = features.double()
    # mean |x - y|^2 = 2 (mean |x|^2 - |mean x|^2), with less rounding once centred
    centred = wide - wide.mean(dim=1, keepdim=True)
    mean_square = 2.0 * centred.square().sum(dim=2).mean(dim=1)
    return mean_square.sqrt().float().clamp_min(_MIN_DISTANCE)


def _label_blocks(
    label: Callable[[Tensor, Tensor, int], Tensor],
    features: Tensor,
    positions: Tensor,
    order: Tensor,
    num_blocks: int,
    num_centres: int,
) -> Tensor:
    """Cluster each block alone; its number of centres is proportional to its tokens."""
    image = torch.arange(order.shape[0], device=order.device)[:, None]
    labels = torch.empty_like(order)
    tokens = [order.shape[1] * block // num_blocks for block in range(num_blocks + 1)]
    centres = [num_centres * block // num_blocks for block in range(num_blocks + 1)]
    for (first, end), (low, high) in zip(pairwise(tokens), pairwise(centres), strict=True):
        block = order[:, first:end].sort(dim=1).values
        count = max(high - low, 1)
        of_block = label(features[image, block], positions[image, block], count)
        labels[image, block] = of_block + low
    return labels
