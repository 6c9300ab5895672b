"""Stages II and III: which tokens stay whole, which are merged, which are dropped.

B images of equal token counts, K clusters; n1, n2, n3 tokens after Stages I, II and III. Counts are
a promise: every image gets exactly the rows of its plan, even if key norms are NaN or infinite.
Shapes depend on arguments only, and the host never waits for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def mean_key_norm(key: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """L2 norm of the key averaged over KV heads; *smaller* is more salient.

    Args:
        key: (..., kv_heads, D), after rotary embedding; the heads are this rank's.
        mean_over_ranks: Averages a tensor over tensor-parallel ranks. The mean of the ranks'
            means is the mean over all heads: each rank has equally many heads, and with fewer
            heads than ranks each head is on equally many ranks.

    Returns:
        (...) float32.
    """
    mean = key.mean(dim=-2, dtype=torch.float32)
    if mean_over_ranks is not None:
        mean = mean_over_ranks(mean)
    norm: Tensor = torch.linalg.vector_norm(mean, dim=-1)
    return norm


class StageTwoSelection(NamedTuple):
    """The n2 rows that Stage II makes of n1 tokens; m of them are merged groups.

    Attributes:
        index: (B, n2) int64, ascending. The source token of each output row: the kept
            token itself, or the median member of a merged group.
        merged: (B, m) int64, the output row of each group.
        groups: (B, n1) int64, the group each token is merged into; m for a token kept whole.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, of no use here
    merged: Tensor
    groups: Tensor


def select_stage_two(
    key_norm: Tensor, labels: Tensor, num_centres: int, n2: int
) -> StageTwoSelection:
    """Choose n2 rows out of n1 tokens (ViTCoP, arXiv 2601.17818, Stage II).

    If K > n2, the n2 - 1 clusters of smallest summed key norm become one merged row each, and
    all other clusters together one more. If K <= n2, every cluster becomes one merged row. The
    other n2 - K rows are tokens kept whole; each cluster keeps a number of them that follows its
    size, those of smallest key norm.

    Args:
        key_norm: (B, n1) float32, no value negative; smaller is more salient, ties go to the
            lower index.
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
    # Not gather: on a CPU, looking up whole rows is many times faster than each number.
    image = torch.arange(images, device=hidden.device)[:, None]
    rows = wide[image, selection.index]
    # Each group has its own row, so the order of additions does not matter.
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
    """The place of each element in ``order``, a permutation per row."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def _bounds(ascending: Tensor, num_values: int, bits: int = 0) -> Tensor:
    """First index of the run of each value, and the end: (B, num_values + 1) int64.

    Args:
        ascending: (B, n) int64, sorted. The value is all but the lowest ``bits``.
        num_values: Number of values, which are 0, 1, 2 and so on.
        bits: Number of lowest bits that are not part of the value.
    """
    values = torch.arange(0, (num_values + 1) << bits, 1 << bits, device=ascending.device)
    return torch.searchsorted(ascending, values.expand(ascending.shape[0], -1).contiguous())


def _places_by_cluster(key_norm: Tensor, labels: Tensor, num_centres: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by label, key norm and index: (B, n1) places, and the clusters' bounds.

    One sort of integers: non-negative floats sort like their int32 bits; NaN sorts last, without
    its sign bit.
    """
    bits = key_norm.float().view(torch.int32) & 0x7FFFFFFF
    ascending, order = (labels << 32).add_(bits).sort(dim=1, stable=True)
    return _ranks(order), _bounds(ascending, num_centres, bits=32)


def _quotas(sums: Tensor, sizes: Tensor, n1: int, n2: int) -> Tensor:
    """Tokens that each cluster keeps whole: (B, K) int64, n2 - K in total.

    A quota is (size - 1) / (n1 - K) * (n2 - K). As in the published program, the quotient and
    then the product are rounded to float32, and halves to the even integer. If the quotas sum to
    less than n2 - K, the clusters of smallest sum get one token more each; if to more, the
    clusters of largest sum one less. Ties go to the lower label.

    One pass is enough. Rounding changes a quota by about half a token at most. So if m tokens are
    missing, at least m clusters were rounded down, and each of them has room: its quota is below
    size - 1. Likewise, if there are m tokens too many, at least m clusters were rounded up, and
    each of them has a token to give back.

    Args:
        sums: (B, K) float64, sum of key norms per cluster.
        sizes: (B, K) int64, tokens per cluster, n1 in total.
        n1: Tokens.
        n2: Rows to return, at least K.
    """
    num_clusters = sizes.shape[1]
    spare = sizes - 1
    # Float32, whatever the default dtype. A tensor, because CUDA multiplies by the reciprocal of
    # a Python number, which rounds differently.
    total = torch.full_like(spare, max(n1 - num_clusters, 1), dtype=torch.float32)
    quotas = (spare / total).mul_(n2 - num_clusters).round_().long()
    missing = (n2 - num_clusters) - quotas.sum(dim=1, keepdim=True)

    step = missing.sign()
    changed = quotas + step
    able = (changed >= 0) & (changed <= spare)
    # Largest sums first if clusters lose tokens.
    order = (sums * step).argsort(dim=1, stable=True)
    in_order = able.gather(1, order)
    chosen = in_order & (in_order.cumsum(dim=1) <= missing.abs())
    return torch.where(torch.empty_like(able).scatter_(1, order, chosen), changed, quotas)


def _merge(groups: Tensor, num_groups: int, n2: int) -> StageTwoSelection:
    """Merge the tokens of each group to one row and keep the others whole.

    Args:
        groups: (B, n1) int64 in [0, num_groups]; num_groups for the n2 - num_groups tokens per
            image that stay whole.
        num_groups: m, groups of at least one token each.
        n2: Rows to return.
    """
    ascending, order = groups.sort(dim=1, stable=True)
    bounds = _bounds(ascending, num_groups)
    # first + size // 2, for size = end - first
    medians = order.gather(1, (bounds[:, :-1] + bounds[:, 1:]) >> 1)
    whole = order[:, order.shape[1] - (n2 - num_groups) :]
    index = torch.cat((medians, whole), dim=1).sort(dim=1).values
    return StageTwoSelection(index, torch.searchsorted(index, medians), groups)
