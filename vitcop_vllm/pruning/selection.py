"""Stages II and III: what is kept whole, what is merged, what is dropped.

B pictures of equal token counts, K clusters; n1, n2, n3 tokens alive in each stage.
Counts are a promise: every picture gets exactly the rows asked for, even if its key norms
are not finite. Shapes depend on arguments only, and nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def mean_key_norm(key: Tensor) -> Tensor:
    """L2 norm of the key averaged over KV heads; *smaller* is more salient.

    Args:
        key: (..., kv_heads, D), after rotary embedding.

    Returns:
        (...) float32.
    """
    norm: Tensor = torch.linalg.vector_norm(key.float().mean(dim=-2), dim=-1)
    return norm


class StageTwoSelection(NamedTuple):
    """What Stage II makes of n1 tokens: n2 rows, m of which stand for a merged group.

    Attributes:
        index: (B, n2) int64, ascending. The source token of each output row: the kept
            token itself, or the median member of a merged group.
        merged: (B, m) int64, the output row of each group.
        mean: (B, m, n1) float32, 1/size at the group's members: the group's mean, which
            is added to its row, is ``mean @ hidden``.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, of no use here
    merged: Tensor
    mean: Tensor


def select_stage_two(
    key_norm: Tensor, labels: Tensor, num_centres: int, n2: int
) -> StageTwoSelection:
    """Choose n2 rows out of n1 tokens (ViTCoP, arXiv 2601.17818, Stage II).

    With K > n2 the n2 - 1 clusters of smallest summed key norm are merged to one row each
    and all the rest to one. With K <= n2 every cluster gives one merged row and the other
    n2 - K rows are tokens kept whole, shared out by cluster size; within a cluster
    the tokens of smallest key norm are kept and the rest is merged.

    Args:
        key_norm: (B, n1), smaller is more salient; equals go to the lower index.
        labels: (B, n1) int64 in [0, K), every label with at least one token.
        num_centres: K.
        n2: Rows to return, from 1 to n1.
    """
    num_tokens = key_norm.shape[1]
    assert 1 <= n2 <= num_tokens, (n2, num_tokens)
    assert 1 <= num_centres <= num_tokens, (num_centres, num_tokens)

    member = _membership(labels, num_centres)
    # In float64 a sum of float32 norms does not depend on the order of its terms.
    sums = torch.where(member, key_norm.double()[:, None], 0.0).sum(dim=2)
    if num_centres > n2:
        rank = _ranks(sums.argsort(dim=1, stable=True))
        groups = rank.gather(1, labels).clamp_max(n2 - 1)
        return _merge(groups, n2, torch.zeros_like(groups, dtype=torch.bool), n2)
    sizes = member.sum(dim=2)
    quotas = _quotas(sums, sizes, num_tokens, n2)
    kept = _ranks_in_cluster(key_norm, labels, sizes) < quotas.gather(1, labels)
    return _merge(labels, num_centres, kept, n2)


def merge_tokens(hidden: Tensor, selection: StageTwoSelection) -> Tensor:
    """Apply Stage II to the residual stream, accumulating in float32.

    Args:
        hidden: (B, n1, H).
        selection: As :func:`select_stage_two` returns it.

    Returns:
        (B, n2, H) in ``hidden``'s dtype.
    """
    wide = hidden.float()
    width = hidden.shape[2]
    rows = wide.gather(1, selection.index[:, :, None].expand(-1, -1, width))
    # Each group has a row of its own, so the order of additions is no question.
    rows.scatter_add_(
        1, selection.merged[:, :, None].expand(-1, -1, width), torch.bmm(selection.mean, wide)
    )
    return rows.to(hidden.dtype)


def select_stage_three(key_norm: Tensor, n3: int) -> Tensor:
    """The n3 tokens of smallest key norm (ViTCoP, arXiv 2601.17818, Stage III).

    Args:
        key_norm: (B, n2), smaller is more salient; equals go to the lower index.
        n3: Tokens to keep, at most n2.

    Returns:
        (B, n3) int64, ascending.
    """
    best = key_norm.argsort(dim=1, stable=True)[:, :n3]
    return best.sort(dim=1).values


def _membership(labels: Tensor, num_labels: int) -> Tensor:
    """[b, k, i]: whether token i has label k."""
    every = torch.arange(num_labels, device=labels.device)
    return labels[:, None, :] == every[:, None]


def _ranks(order: Tensor) -> Tensor:
    """The place of each element in ``order``, a permutation per row."""
    return order.argsort(dim=1)


def _ranks_in_cluster(key_norm: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Place of each token in its cluster, smallest key norm first; (B, n1)."""
    # Two stable sorts make one by (label, key norm, index).
    by_norm = key_norm.argsort(dim=1, stable=True)
    by_label = labels.gather(1, by_norm).argsort(dim=1, stable=True)
    first = sizes.cumsum(dim=1) - sizes
    return _ranks(by_norm.gather(1, by_label)) - first.gather(1, labels)


def _quotas(sums: Tensor, sizes: Tensor, n1: int, n2: int) -> Tensor:
    """Tokens that each cluster keeps whole: (B, K) int64, in total n2 - K.

    Proportional to size - 1 and rounded half to even. What rounding leaves over is handed
    out one each to clusters of smallest sum first, what it overspends is taken back from
    the largest sum first; equal sums by lower label.

    One pass always makes up the total. No share exceeds size - 1, so a cluster that was
    rounded down has room for one more; it was rounded by half a token at most, so there
    are at least twice as many of these as tokens to hand out. Likewise for taking back.
    """
    num_clusters = sizes.shape[1]
    spare = sizes - 1
    total = torch.full_like(sums, max(n1 - num_clusters, 1))
    # The order of operations decides halves, and so does a tensor as the divisor: CUDA
    # multiplies by the reciprocal of a Python one.
    share = spare.double() / total * (n2 - num_clusters)
    quotas = share.round().long()
    missing = (n2 - num_clusters) - quotas.sum(dim=1, keepdim=True)

    smallest_first = sums.argsort(dim=1, stable=True)
    largest_first = sums.argsort(dim=1, stable=True, descending=True)
    given = _first(missing, quotas < spare, smallest_first)
    taken = _first(-missing, quotas > 0, largest_first)
    return quotas + given.long() - taken.long()


def _first(count: Tensor, able: Tensor, order: Tensor) -> Tensor:
    """The first ``count`` clusters in ``order`` that are able; none if it is negative.

    Args:
        count: (B, 1).
        able: (B, K) bool.
        order: (B, K), a permutation per row.

    Returns:
        (B, K) bool.
    """
    in_order = able.gather(1, order)
    chosen = in_order & (in_order.cumsum(dim=1) <= count)
    return chosen.gather(1, _ranks(order))


def _merge(groups: Tensor, num_groups: int, kept: Tensor, n2: int) -> StageTwoSelection:
    """Keep ``kept`` tokens whole and merge the others of each group to one row.

    Args:
        groups: (B, n1) int64 in [0, num_groups).
        num_groups: Groups, each with at least one token that is not kept.
        kept: (B, n1) bool, with n2 - num_groups set per picture.
        n2: Rows to return.
    """
    member = _membership(groups, num_groups) & ~kept[:, None, :]
    size = member.sum(dim=2, keepdim=True)
    place = member.cumsum(dim=2) - 1
    median = member & (place == size // 2)
    # Exactly n2 tokens are sources: sorting them to the front stands in for nonzero.
    source = (kept | median.any(dim=1)).int()
    index = source.argsort(dim=1, descending=True, stable=True)[:, :n2]
    row = source.cumsum(dim=1) - 1
    merged = row.gather(1, median.int().argmax(dim=2))
    return StageTwoSelection(index, merged, member.float() / size)
