"""Choosing tokens on a GPU with one launch where torch takes dozens: Triton kernels.

Each wrapper returns what the torch function of its name returns, with indices, groups and
labels bit for bit; ``fused`` decides who is asked. Where ranks matter one program serves one
picture. It counts them: to compare every token with every other is n^2 integer operations, and
takes neither a sort nor a second launch.

Threads hand values to each other through memory, with a barrier in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUND = 2.0**52
"""Added to and taken from a float64 in [0, 2^52), it leaves the integer nearest, halves even."""

_LAST_32 = tl.constexpr(2**31 - 1)
_LAST_64 = tl.constexpr(2**63 - 1)
_ROUNDING = tl.constexpr(_ROUND)


@triton.jit
def _ordered(x):
    """Integers in the order of floats, -0 with 0, and what is no number last."""
    if x.dtype == tl.float64:
        bits = (x + 0.0).to(tl.int64, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 63) & _LAST_64), _LAST_64)
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(x == x, bits ^ ((bits >> 31) & _LAST_32), _LAST_32)


@triton.jit
def _before(other_key, other, key, index):
    """(BLOCK, CHUNK): whether an element of the chunk comes first; of equals the lower index."""
    less = other_key[None, :] < key[:, None]
    equal = other_key[None, :] == key[:, None]
    return less | (equal & (other[None, :] < index[:, None]))


@triton.jit(do_not_specialize=["n", "count"])
def _first_kernel(
    values, chosen, n, count, DESCENDING: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """The ``count`` smallest or largest of n float32 values, their indices ascending."""
    values += tl.program_id(0).to(tl.int64) * n
    chosen += tl.program_id(0).to(tl.int64) * count
    index = tl.arange(0, BLOCK)
    key = _ordered(tl.load(values + index, mask=index < n, other=0.0))
    key = ~key if DESCENDING else key
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = _ordered(tl.load(values + other, mask=other < n, other=0.0))
        other_key = ~other_key if DESCENDING else other_key
        before = _before(other_key, other, key, index) & (other < n)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    taken = (index < n) & (rank < count)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(chosen + place, index.to(tl.int64), mask=taken)


@triton.jit
def _quotas(
    sums, sizes, real, cluster, keys, wanted, num_spare, NUM: tl.constexpr, CHUNK: tl.constexpr
):
    """As ``selection._quotas``: what each cluster keeps whole, int32, in total ``wanted``.

    Args:
        sums, sizes: (NUM,) float64 and int32, per cluster.
        real: (NUM,) whether there is such a cluster.
        cluster: (NUM,) their numbers.
        keys: NUM int64 of memory to work in.
        wanted: n2 - K.
        num_spare: n1 - K, or 1 where that is 0.
    """
    spare = (sizes - 1).to(tl.float64)
    total = (tl.zeros([NUM], tl.int32) + num_spare).to(tl.float64)
    share = spare / total * wanted.to(tl.float64)
    quotas = tl.where(real, (share + _ROUNDING) - _ROUNDING, 0.0)
    missing = wanted.to(tl.float64) - tl.sum(quotas, axis=0)
    step = tl.where(missing > 0, 1.0, tl.where(missing < 0, -1.0, 0.0)).to(tl.float64)
    changed = quotas + step
    able = real & (changed >= 0) & (changed <= spare)
    # The able ones first, what is no number behind all others of these.
    key = tl.where(able, tl.minimum(_ordered(sums * step), _LAST_64 - 1), _LAST_64)
    tl.store(keys + cluster, key)
    tl.debug_barrier()
    rank = tl.zeros([NUM], tl.int32)
    for start in range(0, NUM, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = tl.load(keys + other, mask=other < NUM, other=_LAST_64)
        before = _before(other_key, other, key, cluster)
        rank += tl.sum(before.to(tl.int32), axis=1)
    tl.debug_barrier()
    chosen = able & (rank.to(tl.float64) < tl.abs(missing))
    return tl.where(chosen, changed, quotas).to(tl.int32)


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
    """``selection.select_stage_two`` of one picture.

    Args:
        norms, labels: n1 float32 and int64, of each token.
        index, merged, groups: Where the selection goes, int64.
        keys: CLUSTERS int64 of memory to work in.
        MANY_CLUSTERS: Whether K > n2.
    """
    picture = tl.program_id(0).to(tl.int64)
    num_groups = tl.minimum(num_centres, n2)
    norms += picture * n1
    labels += picture * n1
    index += picture * n2
    merged += picture * num_groups
    groups += picture * n1
    keys += picture * CLUSTERS

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
    here = token < n1
    label = tl.load(labels + token, mask=here, other=0)
    if MANY_CLUSTERS:
        key = tl.where(real, _ordered(sums), _LAST_64)
        tl.store(keys + cluster, key)
        tl.debug_barrier()
        rank = tl.zeros([CLUSTERS], tl.int32)
        for start in range(0, CLUSTERS, CHUNK):
            other = start + tl.arange(0, CHUNK)
            other_key = tl.load(keys + other, mask=other < CLUSTERS, other=_LAST_64)
            before = _before(other_key, other, key, cluster)
            rank += tl.sum(before.to(tl.int32), axis=1)
        tl.debug_barrier()
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
        key = _ordered(tl.load(norms + token, mask=here, other=0.0))
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n1, CHUNK):
            other = start + tl.arange(0, CHUNK)
            other_key = _ordered(tl.load(norms + other, mask=other < n1, other=0.0))
            other_label = tl.load(labels + other, mask=other < n1, other=-1)
            before = _before(other_key, other, key, token)
            rank += tl.sum((before & (other_label[None, :] == label[:, None])).to(tl.int32), axis=1)
        whole = rank < tl.load(keys + label)
        group = tl.where(whole, num_centres, label)
    tl.store(groups + token, group, mask=here)
    tl.debug_barrier()

    # The median member of a group has half of the others before it.
    size = tl.zeros([BLOCK], tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n1, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_group = tl.load(groups + other, mask=other < n1, other=-1)
        fellow = other_group[None, :] == group[:, None]
        size += tl.sum(fellow.to(tl.int32), axis=1)
        place += tl.sum((fellow & (other[None, :] < token[:, None])).to(tl.int32), axis=1)
    kept = here & (group == num_groups)
    median = here & (group < num_groups) & (place == size // 2)
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
    """WIDTH columns of one row of ``selection.merge_tokens``: a token, and its group's mean."""
    picture = tl.program_id(0).to(tl.int64) // n2
    hidden += picture * n1 * width
    groups += picture * n1
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
        row += total / size
    out = rows + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out, row.to(rows.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _density_kernel(
    gram, distances, densities, n, MINUS_SCALE: tl.constexpr, INDISTINCT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``clustering._feature_distances`` and ``_densities`` of ROWS tokens.

    Args:
        gram: (n, n) float64, products of a picture's features.
        distances, densities: Where n x n and n float32 go.
        MINUS_SCALE: -1 / d_c^2.
        INDISTINCT: ``clustering._INDISTINCT``.
    """
    picture = tl.program_id(0).to(tl.int64)
    gram += picture * n * n
    distances += picture * n * n
    densities += picture * n
    minus_scale = tl.full([1, 1], MINUS_SCALE, tl.float64)
    indistinct = tl.full([1, 1], INDISTINCT, tl.float64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = token < n
    norm = tl.load(gram + token * n + token, mask=here, other=0.0)
    density = tl.zeros([ROWS], tl.float64)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        both = here[:, None] & (other < n)[None, :]
        place = token[:, None] * n + other[None, :]
        scale = (
            norm[:, None] + tl.load(gram + other * n + other, mask=other < n, other=0.0)[None, :]
        )
        squared = scale - 2 * tl.load(gram + place, mask=both, other=0.0)
        squared = tl.where(squared <= scale * indistinct, 0.0, squared)
        distance = tl.sqrt(squared).to(tl.float32)
        tl.store(distances + place, distance, mask=both)
        wide = distance.to(tl.float64)
        density += tl.sum(tl.where(both, tl.exp(wide * wide * minus_scale), 0.0), axis=1)
    tl.store(densities + token, density.to(tl.float32), mask=here)


@triton.jit(do_not_specialize=["n"])
def _parent_kernel(
    distances, densities, positions, parents, scores, n, radius, TIE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The nearest denser neighbour of ROWS tokens, itself where there is none.

    Args:
        distances, densities, positions: A picture's (n, n), (n,) and (n, 2), float32.
        parents: Where n int64 go.
        scores: Where n float32 go: density times delta.
        radius: Farthest a parent may stand.
        TIE: ``clustering._TIE``.
    """
    picture = tl.program_id(0).to(tl.int64)
    distances += picture * n * n
    densities += picture * n
    positions += picture * n * 2
    tie = tl.full([1], TIE, tl.float64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = token < n
    density = tl.load(densities + token, mask=here, other=0.0)
    strict = density.to(tl.float64) - token.to(tl.float64) * tie
    row = tl.load(positions + 2 * token, mask=here, other=0.0)
    column = tl.load(positions + 2 * token + 1, mask=here, other=0.0)
    delta = tl.full([ROWS], float("inf"), tl.float32)
    parent = token
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        there = other < n
        other_density = tl.load(densities + other, mask=there, other=0.0)
        other_strict = other_density.to(tl.float64) - other.to(tl.float64) * tie
        down = row[:, None] - tl.load(positions + 2 * other, mask=there, other=0.0)[None, :]
        right = column[:, None] - tl.load(positions + 2 * other + 1, mask=there, other=0.0)[None, :]
        near = tl.sqrt_rn(down * down + right * right) <= radius
        eligible = near & (other_strict[None, :] > strict[:, None]) & there[None, :]
        place = token[:, None] * n + other[None, :]
        distance = tl.load(distances + place, mask=eligible & here[:, None], other=float("inf"))
        nearest, which = tl.min(
            distance, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        # Of equals the first, also between chunks.
        parent = tl.where(nearest < delta, start + which, parent)
        delta = tl.minimum(nearest, delta)
    tl.store(parents + picture * n + token, parent.to(tl.int64), mask=here)
    tl.store(scores + picture * n + token, density * delta, mask=here)


@triton.jit(do_not_specialize=["n", "num_centres"])
def _label_kernel(
    distances, scores, parents, centres, labels, n, num_centres, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Centres of one picture, and every token's label.

    Args:
        distances, scores: (n, n) and (n,) float32.
        parents: (n,) int64, overwritten.
        centres: n int64 of memory to work in.
        labels: Where n int64 go.
        ROUNDS: How often paths are doubled.
    """
    picture = tl.program_id(0).to(tl.int64)
    distances += picture * n * n
    scores += picture * n
    parents += picture * n
    centres += picture * n
    labels += picture * n
    token = tl.arange(0, BLOCK)
    here = token < n
    key = ~_ordered(tl.load(scores + token, mask=here, other=0.0))
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = ~_ordered(tl.load(scores + other, mask=other < n, other=0.0))
        before = _before(other_key, other, key, token) & (other < n)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    is_centre = here & (rank < num_centres)
    parent = tl.load(parents + token, mask=here, other=0)
    alone = here & (parent == token) & (rank >= num_centres)
    tl.store(centres + rank, token.to(tl.int64), mask=is_centre)
    tl.debug_barrier()

    # A token alone takes the label of the nearest centre; paths may end at it, too.
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    label = tl.where(is_centre, rank, 0)
    for start in range(0, num_centres, CHUNK):
        other = start + tl.arange(0, CHUNK)
        centre = tl.load(centres + other, mask=other < num_centres, other=0)
        asked = alone[:, None] & (other < num_centres)[None, :]
        place = token[:, None] * n + centre[None, :]
        distance = tl.load(distances + place, mask=asked, other=float("inf"))
        closest, which = tl.min(
            distance, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        label = tl.where(closest < nearest, start + which, label)
        nearest = tl.minimum(closest, nearest)

    # Each round doubles how far a token has climbed.
    parent = tl.where(is_centre, token, parent)
    for _ in range(ROUNDS):
        tl.debug_barrier()
        tl.store(parents + token, parent, mask=here)
        tl.debug_barrier()
        parent = tl.load(parents + parent, mask=here, other=0)
    tl.store(centres + token, label.to(tl.int64), mask=here)
    tl.debug_barrier()
    tl.store(labels + token, tl.load(centres + parent, mask=here, other=0), mask=here)


def _block(n: int) -> int:
    return max(16, int(triton.next_power_of_2(n)))


def _chunk(block: int) -> int:
    """How many of n are compared with all of them at once: as registers allow."""
    return max(1, min(block, 4096 // block))


def first(values: Tensor, count: int, *, descending: bool = False) -> Tensor:
    """The smallest or largest of each row: (B, count) int64, ascending, of (B, n) float32."""
    pictures, n = values.shape
    chosen = torch.empty(pictures, count, dtype=torch.int64, device=values.device)
    block = _block(n)
    _first_kernel[(pictures,)](
        values.float().contiguous(), chosen, n, count, descending, block, _chunk(block), num_warps=8
    )
    return chosen


def select_stage_two(
    key_norm: Tensor, labels: Tensor, num_centres: int, n2: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``selection.select_stage_two``: index, merged and groups."""
    pictures, n1 = key_norm.shape
    block, clusters = _block(n1), _block(num_centres)
    index = labels.new_empty(pictures, n2)
    merged = labels.new_empty(pictures, min(num_centres, n2))
    groups = labels.new_empty(pictures, n1)
    keys = labels.new_empty(pictures, clusters)
    # Fusing a product into a sum would skip the rounding that decides halves of quotas.
    _stage_two_kernel[(pictures,)](
        key_norm.float().contiguous(), labels.contiguous(), index, merged, groups, keys,
        n1, n2, num_centres, num_centres > n2, clusters, block, _chunk(block),
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return index, merged, groups


def merge_tokens(hidden: Tensor, index: Tensor, merged: Tensor, groups: Tensor) -> Tensor:
    """``selection.merge_tokens``; sums have another order, so last places may differ."""
    pictures, n1, width = hidden.shape
    n2 = index.shape[1]
    rows = torch.empty(pictures, n2, width, dtype=hidden.dtype, device=hidden.device)
    columns = min(512, _block(width))
    _merge_kernel[(pictures * n2, triton.cdiv(width, columns))](
        hidden.contiguous(), index, groups, rows, n1, n2, merged.shape[1], width, columns, 16,
        num_warps=4,
    )  # fmt: skip
    return rows


def cluster_labels(
    features: Tensor, positions: Tensor, num_centres: int, density_scale: float, radius: float,
    indistinct: float, tie: float,
) -> Tensor:  # fmt: skip
    """``clustering.cluster_labels``."""
    pictures, n, _ = features.shape
    wide = features.double()
    gram = wide @ wide.mT
    distances = torch.empty(pictures, n, n, dtype=torch.float32, device=features.device)
    densities = distances.new_empty(pictures, n)
    scores = torch.empty_like(densities)
    parents = torch.empty(pictures, n, dtype=torch.int64, device=features.device)
    centres, labels = torch.empty_like(parents), torch.empty_like(parents)
    rows, columns = 16, 64
    grid = (pictures, triton.cdiv(n, rows))
    _density_kernel[grid](
        gram, distances, densities, n, -(density_scale**-2), indistinct, rows, columns,
        enable_fp_fusion=False,
    )  # fmt: skip
    _parent_kernel[grid](
        distances, densities, positions.float().contiguous(), parents, scores, n, float(radius),
        tie, rows, columns, enable_fp_fusion=False,
    )  # fmt: skip
    block = _block(n)
    _label_kernel[(pictures,)](
        distances, scores, parents, centres, labels, n, num_centres, (n - 1).bit_length(),
        block, _chunk(block), num_warps=8,
    )  # fmt: skip
    return labels
