"""Visual Information Clustering: density peaks over patch features, within a radius.

B images of equal token count, n tokens, C features, K centres. Shapes depend on arguments only, and
no function waits for the device.
"""

import torch
from torch import Tensor

INDISTINCT = 1e-13
"""Squared distance, divided by the sum of squared norms, at which two feature rows count as equal.

It is above the rounding error of the Gram matrix in float64. As a distance, it is a few units in
the last place of the float32 features.
"""

TIE = 2.0**-38
"""Density that is subtracted once per index, so that no two tokens are equally dense.

Densities lie in [1, n], where distinct float32 values differ by at least 2^-23. So with up to 2^14
tokens the subtraction breaks ties and changes no other order. Float64 represents the difference.
"""


def _feature_distances(features: Tensor) -> Tensor:
    """Euclidean distances, (B, n, n) float32, exactly 0 between equal rows.

    With a float32 Gram matrix, equal rows would have a distance of 0.1. A float64 Gram matrix
    agrees with summed squared differences to float32's last place, is an order of magnitude faster
    on a CPU, and does not depend on the order in which a device sums.
    """
    wide = features.double()
    gram = wide @ wide.mT
    norms = gram.diagonal(dim1=1, dim2=2)
    scale = norms[:, :, None] + norms[:, None, :]
    squared = torch.sub(scale, gram, alpha=2)
    indistinct = squared <= scale.mul_(INDISTINCT)
    return squared.masked_fill_(indistinct, 0.0).sqrt_().float()


def _densities(distances: Tensor, density_scale: float) -> Tensor:
    """rho_i = sum_j exp(-(d_ij / d_c)^2), (B, n) float32.

    Summed in float64 and rounded once, so that equal densities compare equal in any order of
    summation.
    """
    exponents = distances.double().square_().mul_(-(density_scale**-2))
    return exponents.exp_().sum(dim=2).float()


def _too_far(positions: Tensor, radius: float) -> Tensor:
    """(B, n, n) bool: whether two tokens are more than ``radius`` apart."""
    row, column = positions.float().unbind(dim=-1)
    rows_apart = row[:, :, None] - row[:, None, :]
    columns_apart = column[:, :, None] - column[:, None, :]
    return rows_apart.square_().add_(columns_apart.square_()).sqrt_() > radius


def _not_denser(density: Tensor) -> Tensor:
    """(B, n, n) bool, [b, i, j]: whether token j is not denser than token i.

    Of tied tokens the lower index is denser. The order is strict, so a chain of ever denser tokens
    has no cycle.
    """
    index = torch.arange(density.shape[1], device=density.device, dtype=torch.float64)
    strict = torch.sub(density, index, alpha=TIE)
    return strict[:, None, :] <= strict[:, :, None]


def cluster_labels(
    features: Tensor,
    positions: Tensor,
    num_centres: int,
    density_scale: float = 8.0,
    spatial_radius: float = 0.6,
) -> Tensor:
    """Cluster label of every token, by density peaks (ViTCoP, arXiv 2601.17818, VIC).

    A token's parent is the nearest token that is denser and within the radius. Delta is the
    distance to the parent, infinite without a parent. The ``num_centres`` tokens of largest
    density times delta are centres. Every other token belongs to its parent's cluster.

    Two cases differ from the published program, which puts their tokens into one extra cluster:

    - Tokens of equal density. The program may follow their parents in a cycle. Here ties go to
      the lower index.
    - Tokens without a parent that are not centres, because more than ``num_centres`` tokens have
      no parent. Here they join the centre nearest in feature distance; ties go to the lowest
      label.

    Args:
        features: (B, n, C).
        positions: (B, n, 2), row and column as shares of the image.
        num_centres: K, from 1 to n.
        density_scale: d_c, in feature distance.
        spatial_radius: Largest distance of a parent, in the unit of ``positions``.

    Returns:
        (B, n) int64 in [0, K). A label is the rank of its centre by density times delta, largest
        first; ties go to the lower index. Every label has at least one token.
    """
    images, num_tokens, _ = features.shape
    assert 1 <= num_centres <= num_tokens <= 2**14, (num_centres, num_tokens)

    distances = _feature_distances(features)
    density = _densities(distances, density_scale)
    ineligible = _not_denser(density).logical_or_(_too_far(positions, spatial_radius))
    delta, parent = distances.masked_fill(ineligible, torch.inf).min(dim=2)  # ties: lower index

    peaks = (density * delta).argsort(dim=1, descending=True, stable=True)
    centres = peaks[:, :num_centres]
    to_centres = distances.gather(2, centres[:, None, :].expand(-1, num_tokens, -1))
    nearest = to_centres.argmin(dim=2)
    parent = torch.where(delta == torch.inf, centres.gather(1, nearest), parent)
    parent.scatter_(1, centres, centres)

    # Each round doubles the number of parents followed. No chain is longer than n tokens.
    for _ in range((num_tokens - 1).bit_length()):
        parent = parent.gather(1, parent)
    ranks = torch.arange(num_centres, device=features.device).expand(images, -1)
    return nearest.scatter_(1, centres, ranks).gather(1, parent)
