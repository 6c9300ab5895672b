"""Stages II and III: which tokens are kept whole, merged or dropped.

B images of equal token counts, K clusters; Stage I, II and III keep n1, n2 and n3 tokens. Every
image gets exactly n2 and n3 rows, even if its key norms are infinite or NaN. Shapes depend on
arguments only, and no function waits for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def mean_key_norm(key: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """L2 norm of the key averaged over KV heads; *smaller* is more salient.

    Args:
        key: (..., kv_heads, D), after rotary embedding, for the KV heads of this rank.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks. The mean of the ranks'
            means is the mean over all heads: each rank holds equally many heads. If there are
            fewer heads than ranks, equally many ranks hold each head.

    Returns:
        (...) float32.
    """
    mean = key.mean(dim=-2, dtype=torch.float32)
    if mean_over_ranks is not None:
        mean = mean_over_ranks(mean)
    norm: Tensor = torch.linalg.vector_norm(mean, dim=-1)
    return norm


class StageTwoSelection(NamedTuple):
    """Stage II's selection from n1 tokens: n2 rows, of which m are merged groups.

    Attributes:
        index: (B, n2) int64, ascending. The source token of each output row: the kept
            token itself, or the median member of a merged group.
        merged: (B, m) int64, the output row of each group.
        groups: (B, n1) int64, the group that each token is merged into; m if it is kept whole.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which we do not use
    merged: Tensor
    groups: Tensor


def select_stage_two(
    key_norm: Tensor, labels: Tensor, num_centres: int, n2: int
) -> StageTwoSelection:
    """Select n2 rows from n1 tokens (ViTCoP, arXiv 2601.17818, Stage II).

    If K > n2, the n2 - 1 clusters of smallest summed key norm are merged into one row each, and
    all other clusters into one row. If K <= n2, every cluster gives one merged row, and n2 - K
    tokens are kept whole. Each cluster has a quota of these by its size; it keeps its tokens of
    smallest key norm whole and merges the others.

    Args:
        key_norm: (B, n1) float32, not negative; smaller is more salient, ties go to the lower
            index.
        labels: (B, n1) int64 in [0, K), every label with at least one token.
        num_centres: K.
        n2: Rows to return, from 1 to n1.
    """
    num_tokens = key_norm.shape[1]
    assert 1 <= n2 <= num_tokens, (n2, num_tokens)
    assert 1 <= num_centres <= num_tokens, (num_centres, num_tokens)

    # In float64 a sum of float32 norms does not depend on the order of its terms.
    wide = key_norm.double()
    sums = wide.new_zeros(labels.shape[0], num_centres).scatter_add_(1, labels, wide)
    if num_centres > n2:
        rank = _ranks(sums.argsort(dim=1, stable=True))
        return _merge(rank.gather(1, labels).clamp_max_(n2 - 1), n2, n2)
    place, bounds = _places_by_cluster(key_norm, labels, num_centres)
    first = bounds[:, :-1]
    quotas = _quotas(sums, bounds[:, 1:] - first, num_tokens, n2)
    whole = place < (first + quotas).gather(1, labels)
    return _merge(labels.masked_fill(whole, num_centres), num_centres, n2)


def merge_tokens(hidden: Tensor, selection: StageTwoSelection) -> Tensor:
    """Apply Stage II to the residual stream, accumulating in float32.

    Args:
        hidden: (B, n1, H).
        selection: As :func:`select_stage_two` returns it.

    Returns:
        (B, n2, H) in ``hidden``'s dtype.
    """
    wide = hidden.float()
    images, num_groups = selection.merged.shape
    member = wide.new_zeros(images, num_groups + 1, hidden.shape[1])
    member = member.scatter_(1, selection.groups[:, None, :], 1.0)[:, :num_groups]
    means = torch.bmm(member, wide).div_(member.sum(dim=2, keepdim=True))
    # Not gather: on a CPU, indexing whole rows is many times faster than gathering each number.
    image = torch.arange(images, device=hidden.device)[:, None]
    rows = wide[image, selection.index]
    # No two groups share a row, so the order of the additions does not matter.
    rows.scatter_add_(1, selection.merged[:, :, None].expand_as(means), means)
    return rows.to(hidden.dtype)


def select_stage_three(key_norm: Tensor, n3: int) -> Tensor:
    """The n3 tokens of smallest key norm (ViTCoP, arXiv 2601.17818, Stage III).

    Args:
        key_norm: (B, n2), smaller is more salient; ties go to the lower index.
        n3: Tokens to keep, at most n2.

    Returns:
        (B, n3) int64, ascending.
    """
    best = key_norm.argsort(dim=1, stable=True)[:, :n3]
    return best.sort(dim=1).values


def _ranks(order: Tensor) -> Tensor:
    """(B, n) rank of each element, where ``order`` lists the elements by rank."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _bounds(ascending: Tensor, num_values: int, bits: int = 0) -> Tensor:
    """(B, num_values + 1) int64: first index of each value's run, and the end of the last run.

    Args:
        ascending: (B, n) int64, sorted. The run of value v holds the elements x with
            x >> bits == v.
        num_values: Number of values: 0, 1, 2 and so on.
        bits: Number of lowest bits to ignore.
    """
    values = torch.arange(0, (num_values + 1) << bits, 1 << bits, device=ascending.device)
    return torch.searchsorted(ascending, values.expand(ascending.shape[0], -1).contiguous())


def _places_by_cluster(key_norm: Tensor, labels: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by (label, key norm, index).

    One sort of integers: non-negative floats, including infinity, sort like their int32 bits. NaN
    sorts last if its sign bit is cleared.

    Returns:
        (B, n1) place of each token in that order, and (B, K + 1) bounds of the clusters.
    """
    bits = key_norm.float().view(torch.int32) & 0x7FFFFFFF
    ascending, order = (labels << 32).add_(bits).sort(dim=1, stable=True)
    return _ranks(order), _bounds(ascending, num_centres, bits=32)


def _quotas(sums: Tensor, sizes: Tensor, n1: int, n2: int) -> Tensor:
    """Tokens that each cluster keeps whole: (B, K) int64, n2 - K in total.

    A quota is (size - 1) / (n1 - K) * (n2 - K), rounded half to even. As in the published
    program, the quotient and then the product are float32, so their rounding decides exact
    halves. If the quotas sum to less than n2 - K, the clusters of smallest sum keep one more token
    each. If they sum to more, the clusters of largest sum keep one fewer. Ties go to the lower
    label.

    One such pass is enough. Rounding changes a quota by at most half a token, or slightly more in
    float32. So if tokens are missing, at least as many clusters were rounded down, and each of
    these can keep one more: its quota is below size - 1. Likewise, if there are too many tokens, at
    least as many clusters were rounded up, and each of these can keep one fewer.

    Args:
        sums: (B, K) float64, sum of key norms per cluster.
        sizes: (B, K) int64, tokens per cluster, n1 in total.
        n1: Tokens.
        n2: Rows to return, at least K.
    """
    num_clusters = sizes.shape[1]
    spare = sizes - 1
    # Float32 with any default dtype. A tensor, because CUDA multiplies by the reciprocal of a
    # Python number, which rounds differently.
    total = torch.full_like(spare, max(n1 - num_clusters, 1), dtype=torch.float32)
    quotas = (spare / total).mul_(n2 - num_clusters).round_().long()
    missing = (n2 - num_clusters) - quotas.sum(dim=1, keepdim=True)

    step = missing.sign()
    changed = quotas + step
    can_change = (changed >= 0) & (changed <= spare)
    # Smallest sums first if tokens are missing, largest sums first if there are too many.
    order = (sums * step).argsort(dim=1, stable=True)
    in_order = can_change.gather(1, order)
    chosen = in_order & (in_order.cumsum(dim=1) <= missing.abs())
    return torch.where(torch.empty_like(can_change).scatter_(1, order, chosen), changed, quotas)


def _merge(groups: Tensor, num_groups: int, n2: int) -> StageTwoSelection:
    """Merge the tokens of each group into one row and keep the others whole.

    Args:
        groups: (B, n1) int64 in [0, num_groups]. The value is num_groups for tokens kept whole,
            n2 - num_groups per image.
        num_groups: m, number of groups; each has at least one token.
        n2: Rows to return.
    """
    ascending, order = groups.sort(dim=1, stable=True)
    bounds = _bounds(ascending, num_groups)
    # first + size // 2, for size = end - first
    medians = order.gather(1, (bounds[:, :-1] + bounds[:, 1:]) >> 1)
    whole = order[:, order.shape[1] - (n2 - num_groups) :]
    index = torch.cat((medians, whole), dim=1).sort(dim=1).values
    return StageTwoSelection(index, torch.searchsorted(index, medians), groups)
