"""Visual Information Clustering: density peaks over patch features, within a radius.

B images of equal token count, n tokens, C features, K centres. Shapes depend on arguments only, and
the host never waits for the device.
"""

import torch
from torch import Tensor

INDISTINCT = 1e-13
"""Squared distance, over squared norms, below which two feature rows count as equal.

It lies above the Gram matrix's rounding error in float64 and, as a distance, within a
few units in the last place of the float32 features themselves.
"""

TIE = 2.0**-38
"""Density subtracted per index, so that no two tokens are equally dense.

Densities lie in [1, n], where float32 values are at least 2^-23 apart. So with up to 2^14 tokens
the order of unequal densities does not change, and float64 represents the difference.
"""


def _feature_distances(features: Tensor) -> Tensor:
    """Euclidean distances, (B, n, n) float32, exactly 0 between equal rows.

    A float32 Gram matrix would leave equal rows 0.1 apart. In float64 it agrees with
    summed squared differences to float32's last place, is an order of magnitude faster
    than those on a CPU, and does not depend on the order in which a device sums.
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

    Summed in float64 and rounded once, so that equal densities compare equal whatever
    the order of their terms.
    """
    exponents = distances.double().square_().mul_(-(density_scale**-2))
    return exponents.exp_().sum(dim=2).float()


def _too_far(positions: Tensor, radius: float) -> Tensor:
    """Whether two tokens stand more than ``radius`` apart, (B, n, n)."""
    row, column = positions.float().unbind(dim=-1)
    rows_apart = row[:, :, None] - row[:, None, :]
    columns_apart = column[:, :, None] - column[:, None, :]
    return rows_apart.square_().add_(columns_apart.square_()).sqrt_() > radius


def _no_denser(density: Tensor) -> Tensor:
    """[b, i, j]: whether j is not denser than i; of two equal densities, the lower index is denser.

    The order is strict, so chains of ever denser tokens have no cycles.
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
    """The cluster of every token: density peaks (ViTCoP, arXiv 2601.17818, VIC).

    The parent of a token is the nearest token that is denser and within the radius; delta is the
    distance to it, infinite without a parent. The ``num_centres`` tokens of largest density times
    delta are centres; every other token belongs to the cluster of its parent. Equal densities are
    ordered by index. (In the published program their parents may form a cycle, and such tokens
    become one cluster.)

    The method does not define the cluster of a token that has no parent and is not a centre, of
    which there are some if more than ``num_centres`` tokens have no parent. (The published program
    puts them into one cluster, too.) Here such a token joins the centre nearest in feature
    distance; ties go to the lower label.

    Args:
        features: (B, n, C).
        positions: (B, n, 2), row and column as shares of the image.
        num_centres: K, from 1 to n.
        density_scale: d_c, in feature distance.
        spatial_radius: Farthest a parent may stand, in the unit of ``positions``.

    Returns:
        (B, n) int64 in [0, K). A label is the rank of its centre by density times delta, largest
        first, ties by index; every label has at least one token.
    """
    images, num_tokens, _ = features.shape
    assert 1 <= num_centres <= num_tokens <= 2**14, (num_centres, num_tokens)

    distances = _feature_distances(features)
    density = _densities(distances, density_scale)
    ineligible = _no_denser(density).logical_or_(_too_far(positions, spatial_radius))
    delta, parent = distances.masked_fill(ineligible, torch.inf).min(dim=2)  # ties: the first

    peaks = (density * delta).argsort(dim=1, descending=True, stable=True)
    centres = peaks[:, :num_centres]
    to_centres = distances.gather(2, centres[:, None, :].expand(-1, num_tokens, -1))
    nearest = to_centres.argmin(dim=2)
    parent = torch.where(delta == torch.inf, centres.gather(1, nearest), parent)
    parent.scatter_(1, centres, centres)

    # Each round doubles the length of the chains; no chain is longer than the image.
    for _ in range((num_tokens - 1).bit_length()):
        parent = parent.gather(1, parent)
    ranks = torch.arange(num_centres, device=features.device).expand(images, -1)
    return nearest.scatter_(1, centres, ranks).gather(1, parent)
