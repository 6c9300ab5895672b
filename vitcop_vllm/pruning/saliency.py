"""Saliency of an image's patches, by which Stage I selects them.

B images of equal token count, V visual tokens, D head size. Shapes depend on arguments only, and
no function waits for the device.
"""

from math import gcd

import torch
from torch import Tensor


def cls_saliency(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each patch receives from [CLS]; higher is more salient.

    saliency_i = sum over heads of softmax(scale q_cls K^T)_i, with the softmax taken over
    [CLS] and all patches (ViTCoP, arXiv 2601.17818, Stage I).

    Args:
        query: (B, heads, D), the query of [CLS].
        keys: (B, 1 + V, heads, D), token 0 is [CLS].
        scale: Factor on the scores, usually D ** -0.5.

    Returns:
        (B, V) float32.
    """
    scores = torch.einsum("bhd,bthd->bht", query.float(), keys.float()) * scale
    return scores.softmax(dim=-1).sum(dim=1)[:, 1:]


MAX_SCORES = 1 << 22
"""Attention scores that :func:`attention_received` computes at once: 16 MiB in float32, which fits
into a cache."""


MAX_QUERIES = 512
"""Maximum number of queries that attention received is averaged over. If an image has more, this
many are sampled, so its cost grows linearly with its tokens. docs/results.md compares samples."""


def _spread(num_queries: int, device: torch.device) -> Tensor:
    """(MAX_QUERIES,) int64: distinct indices in [0, ``num_queries``), evenly spread.

    The step is the golden section of the range, so that the sample covers all columns of an image.
    """
    step = round(num_queries * (5**0.5 - 1) / 2)
    while gcd(step, num_queries) != 1:
        step += 1
    return torch.arange(MAX_QUERIES, device=device) * step % num_queries


def attention_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each key receives, averaged over queries; higher is more salient.

    received_i = mean over queries of the sum over heads of softmax(scale q K^T)_i. It replaces
    the attention of [CLS] in encoders without [CLS], as in VisionZip (arXiv 2412.04467). If there
    are more than :data:`MAX_QUERIES` queries, the mean is over an even sample of them.

    Each image is computed by itself, a chunk of queries at a time. The chunks depend only on the
    image's size, so an image's result is bit-identical in any batch.

    Args:
        queries: (B, Q, heads, D).
        keys: (B, T, heads, D).
        scale: Factor on the scores, usually D ** -0.5.

    Returns:
        (B, T) float32.
    """
    if queries.shape[1] > MAX_QUERIES:
        queries = queries[:, _spread(queries.shape[1], queries.device)]
    num_queries, heads = queries.shape[1:3]
    step = max(1, MAX_SCORES // (heads * keys.shape[1]))
    received = []
    for image_queries, image_keys in zip(queries, keys, strict=True):
        transposed = image_keys.float().permute(1, 2, 0)
        total = transposed.new_zeros(keys.shape[1])
        for chunk in image_queries.split(step):
            scores = (chunk.float() * scale).transpose(0, 1) @ transposed
            total += scores.softmax(dim=-1).sum(dim=(0, 1))
        received.append(total / num_queries)
    return torch.stack(received)


def most_salient(saliency: Tensor, count: int) -> Tensor:
    """The ``count`` patches of highest saliency, in their original order.

    Args:
        saliency: (B, V), higher is more salient; ties go to the lower index.
        count: Patches to keep, at most V.

    Returns:
        (B, count) int64, ascending.
    """
    # Not topk: it does not specify which of several tied values it returns.
    best = saliency.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values


def patch_positions(index: Tensor, grid_height: int, grid_width: int) -> Tensor:
    """Positions of patches in the image, as (row / height, column / width).

    Args:
        index: (B, n) patch indices in row-major order.
        grid_height: Rows of patches.
        grid_width: Columns of patches.

    Returns:
        (B, n, 2) float32 in [0, 1).
    """
    # The divisors are tensors: for a Python number CUDA multiplies by the reciprocal, and the
    # result may be one ulp off the CPU's. That matters if a distance equals the radius exactly.
    height = index.new_full((1,), grid_height, dtype=torch.float32)
    width = index.new_full((1,), grid_width, dtype=torch.float32)
    row = index.div(grid_width, rounding_mode="floor")
    return torch.stack((row / height, index.remainder(grid_width) / width), dim=-1)
