"""Stage I: the saliency of visual tokens, from the attention of the vision encoder.

B images of equal token count, V visual tokens, D head size. Shapes depend on arguments only, and
the host never waits for the device.
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
"""Attention scores in memory at once: 16 MiB in float32, which fits into CPU caches."""


MAX_QUERIES = 512
"""Most queries that :func:`attention_received` averages over. With more, it takes a sample, so that
the cost of an image grows with its tokens and not with their square. docs/results.md compares
sample sizes."""


def _spread(num_queries: int, device: torch.device) -> Tensor:
    """(MAX_QUERIES,) int64 indices below ``num_queries``, all different and evenly spread.

    The step is about the golden section of ``num_queries``: an even step could visit only some
    columns of the image.
    """
    step = round(num_queries * (5**0.5 - 1) / 2)
    while gcd(step, num_queries) != 1:
        step += 1
    return torch.arange(MAX_QUERIES, device=device) * step % num_queries


def attention_received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each key receives, averaged over queries; higher is more salient.

    received_i = mean over queries of the sum over heads of softmax(scale q K^T)_i. In encoders
    without [CLS] it replaces the attention of [CLS], as in VisionZip (arXiv 2412.04467).

    Each image is computed alone, in chunks of queries. The chunks depend on the image only, so an
    image gets the same bits in any batch. Of more than :data:`MAX_QUERIES` queries, only an even
    sample is used.

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
        for some in image_queries.split(step):
            scores = (some.float() * scale).transpose(0, 1) @ transposed
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
    # Not topk, which does not specify the order of ties.
    best = saliency.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values
