"""Visual Information Clustering, in three kernel launches and a matrix product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitcop_vllm.pruning.clustering import INDISTINCT, TIE
from vitcop_vllm.pruning.kernels.order import block_of, chunk_of, ranks


@triton.jit(do_not_specialize=["n"])
def _density_kernel(
    gram, distances, densities, n, MINUS_SCALE: tl.constexpr, INDISTINCT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``clustering._feature_distances`` and ``_densities`` of ROWS tokens.

    Args:
        gram: (n, n) float64, products of an image's features.
        distances, densities: Outputs, (n, n) and (n,) float32.
        MINUS_SCALE: -1 / d_c^2.
        INDISTINCT: ``clustering.INDISTINCT``.
    """
    image = tl.program_id(0).to(tl.int64)
    gram += image * n * n
    distances += image * n * n
    densities += image * n
    minus_scale = tl.full([1, 1], MINUS_SCALE, tl.float64)
    indistinct = tl.full([1, 1], INDISTINCT, tl.float64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = token < n
    norm = tl.load(gram + token * n + token, mask=valid, other=0.0)
    density = tl.zeros([ROWS], tl.float64)
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        both = valid[:, None] & (other < n)[None, :]
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
    tl.store(densities + token, density.to(tl.float32), mask=valid)


@triton.jit(do_not_specialize=["n"])
def _parent_kernel(
    distances, densities, positions, parents, scores, n, radius, TIE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Parents of ROWS tokens: the nearest denser neighbour, or the token itself without one.

    Args:
        distances, densities, positions: (n, n), (n,) and (n, 2) float32 of an image.
        parents: Output, (n,) int64.
        scores: Output, (n,) float32: density times delta.
        radius: Largest distance of a parent.
        TIE: ``clustering.TIE``.
    """
    image = tl.program_id(0).to(tl.int64)
    distances += image * n * n
    densities += image * n
    positions += image * n * 2
    tie = tl.full([1], TIE, tl.float64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = token < n
    density = tl.load(densities + token, mask=valid, other=0.0)
    strict = density.to(tl.float64) - token.to(tl.float64) * tie
    row = tl.load(positions + 2 * token, mask=valid, other=0.0)
    column = tl.load(positions + 2 * token + 1, mask=valid, other=0.0)
    delta = tl.full([ROWS], float("inf"), tl.float32)
    parent = token
    for start in range(0, n, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_valid = other < n
        other_density = tl.load(densities + other, mask=other_valid, other=0.0)
        other_strict = other_density.to(tl.float64) - other.to(tl.float64) * tie
        down = row[:, None] - tl.load(positions + 2 * other, mask=other_valid, other=0.0)[None, :]
        right = (
            column[:, None]
            - tl.load(positions + 2 * other + 1, mask=other_valid, other=0.0)[None, :]
        )
        near = tl.sqrt_rn(down * down + right * right) <= radius
        eligible = near & (other_strict[None, :] > strict[:, None]) & other_valid[None, :]
        place = token[:, None] * n + other[None, :]
        distance = tl.load(distances + place, mask=eligible & valid[:, None], other=float("inf"))
        nearest, which = tl.min(
            distance, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        # Strictly nearer, so that ties between chunks go to the lower index.
        parent = tl.where(nearest < delta, start + which, parent)
        delta = tl.minimum(nearest, delta)
    tl.store(parents + image * n + token, parent.to(tl.int64), mask=valid)
    tl.store(scores + image * n + token, density * delta, mask=valid)


@triton.jit(do_not_specialize=["n", "num_centres"])
def _label_kernel(
    distances, scores, parents, centres, labels, n, num_centres, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Centres of one image, and every token's label.

    Args:
        distances, scores: (n, n) and (n,) float32.
        parents: (n,) int64, overwritten.
        centres: Scratch memory, (n,) int64.
        labels: Output, (n,) int64.
        ROUNDS: Rounds of following parents; each doubles the number of parents followed.
    """
    image = tl.program_id(0).to(tl.int64)
    distances += image * n * n
    scores += image * n
    parents += image * n
    centres += image * n
    labels += image * n
    token = tl.arange(0, BLOCK)
    valid = token < n
    rank = ranks(scores, token, n, True, BLOCK, CHUNK)
    is_centre = valid & (rank < num_centres)
    parent = tl.load(parents + token, mask=valid, other=0)
    without_centre = valid & (parent == token) & (rank >= num_centres)
    tl.store(centres + rank, token.to(tl.int64), mask=is_centre)
    tl.debug_barrier()

    # A token without a parent that is not a centre takes the label of the nearest centre. Other
    # tokens may reach it by following their parents.
    nearest = tl.full([BLOCK], float("inf"), tl.float32)
    label = tl.where(is_centre, rank, 0)
    for start in range(0, num_centres, CHUNK):
        other = start + tl.arange(0, CHUNK)
        centre = tl.load(centres + other, mask=other < num_centres, other=0)
        mask = without_centre[:, None] & (other < num_centres)[None, :]
        place = token[:, None] * n + centre[None, :]
        distance = tl.load(distances + place, mask=mask, other=float("inf"))
        closest, which = tl.min(
            distance, axis=1, return_indices=True, return_indices_tie_break_left=True
        )
        label = tl.where(closest < nearest, start + which, label)
        nearest = tl.minimum(closest, nearest)

    # Each round doubles the number of parents followed.
    parent = tl.where(is_centre, token, parent)
    for _ in range(ROUNDS):
        tl.debug_barrier()
        tl.store(parents + token, parent, mask=valid)
        tl.debug_barrier()
        parent = tl.load(parents + parent, mask=valid, other=0)
    tl.store(centres + token, label.to(tl.int64), mask=valid)
    tl.debug_barrier()
    tl.store(labels + token, tl.load(centres + parent, mask=valid, other=0), mask=valid)


def cluster_labels(
    features: Tensor,
    positions: Tensor,
    num_centres: int,
    density_scale: float = 8.0,
    spatial_radius: float = 0.6,
) -> Tensor:
    """``clustering.cluster_labels``."""
    images, n, _ = features.shape
    assert 1 <= num_centres <= n, (num_centres, n)
    wide = features.double()
    gram = wide @ wide.mT
    distances = torch.empty(images, n, n, dtype=torch.float32, device=features.device)
    densities = distances.new_empty(images, n)
    scores = torch.empty_like(densities)
    parents = torch.empty(images, n, dtype=torch.int64, device=features.device)
    centres, labels = torch.empty_like(parents), torch.empty_like(parents)
    rows, columns = 16, 64
    grid = (images, triton.cdiv(n, rows))
    _density_kernel[grid](
        gram, distances, densities, n, -(density_scale**-2), INDISTINCT, rows, columns,
        enable_fp_fusion=False,
    )  # fmt: skip
    _parent_kernel[grid](
        distances, densities, positions.float().contiguous(), parents, scores, n,
        float(spatial_radius), TIE, rows, columns, enable_fp_fusion=False,
    )  # fmt: skip
    block = block_of(n)
    _label_kernel[(images,)](
        distances, scores, parents, centres, labels, n, num_centres, (n - 1).bit_length(),
        block, chunk_of(block), num_warps=8,
    )  # fmt: skip
    return labels
