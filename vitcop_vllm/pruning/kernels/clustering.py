"""Visual Information Clustering, in three launches and a product."""

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
        distances, densities: Where n x n and n float32 go.
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
        distances, densities, positions: An image's (n, n), (n,) and (n, 2), float32.
        parents: Where n int64 go.
        scores: Where n float32 go: density times delta.
        radius: Farthest a parent may stand.
        TIE: ``clustering.TIE``.
    """
    image = tl.program_id(0).to(tl.int64)
    distances += image * n * n
    densities += image * n
    positions += image * n * 2
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
    tl.store(parents + image * n + token, parent.to(tl.int64), mask=here)
    tl.store(scores + image * n + token, density * delta, mask=here)


@triton.jit(do_not_specialize=["n", "num_centres"])
def _label_kernel(
    distances, scores, parents, centres, labels, n, num_centres, ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Centres of one image, and every token's label.

    Args:
        distances, scores: (n, n) and (n,) float32.
        parents: (n,) int64, overwritten.
        centres: n int64 of memory to work in.
        labels: Where n int64 go.
        ROUNDS: How often paths are doubled.
    """
    image = tl.program_id(0).to(tl.int64)
    distances += image * n * n
    scores += image * n
    parents += image * n
    centres += image * n
    labels += image * n
    token = tl.arange(0, BLOCK)
    here = token < n
    rank = ranks(scores, token, n, True, BLOCK, CHUNK)
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
