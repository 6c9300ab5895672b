"""Stage II: which tokens are kept whole, which are merged, and the merging."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitcop_vllm.pruning.kernels.order import (
    LAST_64,
    block_of,
    chunk_of,
    comes_before,
    order_key,
)
from vitcop_vllm.pruning.selection import StageTwoSelection

_TO_INTEGER = tl.constexpr(2.0**23)
"""Adding and then subtracting this rounds a float32 in [0, 2^23) to an integer, halves to even."""


@triton.jit
def _cluster_ranks(key, cluster, keys, NUM: tl.constexpr, CHUNK: tl.constexpr):
    """(NUM,) int32 ranks of clusters.

    Args:
        key: (NUM,) int64, smallest first; ties go to the lower number.
        cluster: (NUM,) int32, numbers of the clusters.
        keys: Scratch memory, (NUM,) int64. The caller may use it again afterwards.
    """
    tl.store(keys + cluster, key)
    tl.debug_barrier()
    rank = tl.zeros([NUM], tl.int32)
    for start in range(0, NUM, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = tl.load(keys + other, mask=other < NUM, other=LAST_64)
        before = comes_before(other_key, other, key, cluster)
        rank += tl.sum(before.to(tl.int32), axis=1)
    tl.debug_barrier()
    return rank


@triton.jit
def _quotas(
    sums, sizes, real, cluster, keys, wanted, num_spare, NUM: tl.constexpr, CHUNK: tl.constexpr
):
    """``selection._quotas``: tokens that each cluster keeps whole, int32, ``wanted`` in total.

    Args:
        sums, sizes: (NUM,) float64 and int32, per cluster.
        real: (NUM,) bool, false for padding after the K clusters.
        cluster: (NUM,) int32, numbers of the clusters.
        keys: Scratch memory, (NUM,) int64.
        wanted: n2 - K.
        num_spare: n1 - K, or 1 if that is 0.
    """
    spare = sizes - 1
    total = (tl.zeros([NUM], tl.int32) + num_spare).to(tl.float32)
    # Plain / is approximate in float32.
    share = tl.div_rn(spare.to(tl.float32), total) * wanted.to(tl.float32)
    quotas = tl.where(real, ((share + _TO_INTEGER) - _TO_INTEGER).to(tl.int32), 0)
    missing = wanted - tl.sum(quotas, axis=0)
    step = tl.where(missing > 0, 1, tl.where(missing < 0, -1, 0))
    changed = quotas + step
    can_change = real & (changed >= 0) & (changed <= spare)
    # Clusters that can change rank first. Of these, a NaN sum ranks last.
    sum_key = tl.minimum(order_key(sums * step.to(tl.float64)), LAST_64 - 1)
    rank = _cluster_ranks(tl.where(can_change, sum_key, LAST_64), cluster, keys, NUM, CHUNK)
    chosen = can_change & (rank < tl.abs(missing))
    return tl.where(chosen, changed, quotas)


@triton.jit(do_not_specialize=["n1", "n2", "num_centres"])
def _stage_two_kernel(
    norms,
    labels,
    index,
    merged,
    groups,
    keys,
    n1,
    n2,
    num_centres,
    MANY_CLUSTERS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``selection.select_stage_two`` of one image.

    Args:
        norms, labels: (n1,) float32 and int64, of each token.
        index, merged, groups: Outputs, int64: the fields of ``StageTwoSelection``.
        keys: Scratch memory, (CLUSTERS,) int64.
        MANY_CLUSTERS: Whether K > n2.
    """
    image = tl.program_id(0).to(tl.int64)
    num_groups = tl.minimum(num_centres, n2)
    norms += image * n1
    labels += image * n1
    index += image * n2
    merged += image * num_groups
    groups += image * n1
    keys += image * CLUSTERS

    cluster = tl.arange(0, CLUSTERS)
    real = cluster < num_centres
    sums = tl.zeros([CLUSTERS], tl.float64)
    sizes = tl.zeros([CLUSTERS], tl.int32)
    for start in range(0, n1, CHUNK):
        other = start + tl.arange(0, CHUNK)
        label = tl.load(labels + other, mask=other < n1, other=-1)
        norm = tl.load(norms + other, mask=other < n1, other=0.0).to(tl.float64)
        member = label[None, :] == cluster[:, None]
        sums += tl.sum(tl.where(member, norm[None, :], 0.0), axis=1)
        sizes += tl.sum(member.to(tl.int32), axis=1)

    token = tl.arange(0, BLOCK)
    valid = token < n1
    label = tl.load(labels + token, mask=valid, other=0)
    if MANY_CLUSTERS:
        key = tl.where(real, order_key(sums), LAST_64)
        rank = _cluster_ranks(key, cluster, keys, CLUSTERS, CHUNK)
        tl.store(keys + cluster, tl.minimum(rank, n2 - 1).to(tl.int64))
        tl.debug_barrier()
        group = tl.load(keys + label)
    else:
        quotas = _quotas(
            sums, sizes, real, cluster, keys, n2 - num_centres, tl.maximum(n1 - num_centres, 1),
            CLUSTERS, CHUNK,
        )  # fmt: skip
        tl.store(keys + cluster, quotas.to(tl.int64))
        tl.debug_barrier()
        key = order_key(tl.load(norms + token, mask=valid, other=0.0))
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n1, CHUNK):
            other = start + tl.arange(0, CHUNK)
            other_key = order_key(tl.load(norms + other, mask=other < n1, other=0.0))
            other_label = tl.load(labels + other, mask=other < n1, other=-1)
            before = comes_before(other_key, other, key, token)
            rank += tl.sum((before & (other_label[None, :] == label[:, None])).to(tl.int32), axis=1)
        whole = rank < tl.load(keys + label)
        group = tl.where(whole, num_centres, label)
    tl.store(groups + token, group, mask=valid)
    tl.debug_barrier()

    # The median member of a group has size // 2 members before it.
    size = tl.zeros([BLOCK], tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n1, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_group = tl.load(groups + other, mask=other < n1, other=-1)
        same_group = other_group[None, :] == group[:, None]
        size += tl.sum(same_group.to(tl.int32), axis=1)
        place += tl.sum((same_group & (other[None, :] < token[:, None])).to(tl.int32), axis=1)
    kept = valid & (group == num_groups)
    median = valid & (group < num_groups) & (place == size // 2)
    row = tl.cumsum((kept | median).to(tl.int32), axis=0) - 1
    tl.store(index + row, token.to(tl.int64), mask=kept | median)
    tl.store(merged + group, row.to(tl.int64), mask=median)


@triton.jit(do_not_specialize=["n1", "n2", "num_groups"])
def _merge_kernel(
    hidden,
    index,
    groups,
    rows,
    n1,
    n2,
    num_groups,
    width,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """WIDTH columns of one output row of ``selection.merge_tokens``.

    The row is its source token, plus the mean of the group if the token is in a group.
    """
    image = tl.program_id(0).to(tl.int64) // n2
    hidden += image * n1 * width
    groups += image * n1
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    source = tl.load(index + tl.program_id(0))
    group = tl.load(groups + source)
    row = tl.load(hidden + source * width + column, mask=inside, other=0.0).to(tl.float32)
    if group < num_groups:
        total = tl.zeros([WIDTH], tl.float32)
        size = 0
        for start in range(0, n1, CHUNK):
            other = start + tl.arange(0, CHUNK)
            member = tl.load(groups + other, mask=other < n1, other=-1) == group
            size += tl.sum(member.to(tl.int32), axis=0)
            place = other.to(tl.int64)[:, None] * width + column[None, :]
            value = tl.load(hidden + place, mask=member[:, None] & inside[None, :], other=0.0)
            total += tl.sum(value.to(tl.float32), axis=0)
        row += tl.div_rn(total, tl.zeros([WIDTH], tl.float32) + size)
    out = rows + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out, row.to(rows.dtype.element_ty), mask=inside)


def select_stage_two(
    key_norm: Tensor, labels: Tensor, num_centres: int, n2: int
) -> StageTwoSelection:
    """``selection.select_stage_two``."""
    images, n1 = key_norm.shape
    assert 1 <= n2 <= n1, (n2, n1)
    assert 1 <= num_centres <= n1, (num_centres, n1)
    block, clusters = block_of(n1), block_of(num_centres)
    index = labels.new_empty(images, n2)
    merged = labels.new_empty(images, min(num_centres, n2))
    groups = labels.new_empty(images, n1)
    keys = labels.new_empty(images, clusters)
    # A fused multiply-add would skip the rounding that decides exact halves of quotas.
    _stage_two_kernel[(images,)](
        key_norm.float().contiguous(), labels.contiguous(), index, merged, groups, keys,
        n1, n2, num_centres, num_centres > n2, clusters, block, chunk_of(block),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return StageTwoSelection(index, merged, groups)


def merge_tokens(hidden: Tensor, selection: StageTwoSelection) -> Tensor:
    """``selection.merge_tokens``. It sums in another order, so the last digits may differ."""
    index, merged, groups = selection
    images, n1, width = hidden.shape
    n2 = index.shape[1]
    rows = torch.empty(images, n2, width, dtype=hidden.dtype, device=hidden.device)
    columns = min(512, block_of(width))
    _merge_kernel[(images * n2, triton.cdiv(width, columns))](
        hidden.contiguous(), index, groups, rows, n1, n2, merged.shape[1], width, columns, 16,
        num_warps=4,
    )  # fmt: skip
    return rows
