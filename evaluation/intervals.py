"""95 % intervals of accuracies and of their differences.

All are in closed form: the same figures give the same interval. Where nothing went wrong, or
nothing changed, they are not of width 0, as a bootstrap's would be.
"""

import math
from collections.abc import Sequence

Interval = tuple[float, float]

_Z = 1.959963984540054
"""Standard normal quantile of 0.975."""


def wilson(proportion: float, trials: int) -> Interval:
    """Wilson's score interval of a proportion seen in independent trials.

    Scores between 0 and 1 vary less than right and wrong do: for them it errs to the wide side.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    z2 = _Z * _Z / trials
    centre = (proportion + z2 / 2) / (1 + z2)
    half = math.sqrt(proportion * (1 - proportion) * z2 + z2 * z2 / 4) / (1 + z2)
    # The limits at 0 and 1 are exact but for rounding.
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Interval of the mean of ``ours`` less that of ``theirs``, scores of the same examples.

    Newcombe's (1998, method 10) for matched proportions: Wilson's intervals of both, joined
    by how alike the two answer. Scores between 0 and 1 make it err to the wide side.
    """
    trials = len(ours)
    p, q = math.fsum(ours) / trials, math.fsum(theirs) / trials
    (p_low, p_high), (q_low, q_high) = wilson(p, trials), wilson(q, trials)
    product = math.fsum(a * b for a, b in zip(ours, theirs, strict=True)) / trials
    covariance = product - p * q
    if covariance > 0:  # His continuity correction, of half an example.
        covariance = max(0.0, covariance - 0.5 / trials)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    alike = covariance / spread if spread else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * alike * a * b + b * b))

    return p - q - joined(p - p_low, q_high - q), p - q + joined(p_high - p, q - q_low)


def interval_of_mean(estimates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Interval of the unweighted mean of independent estimates, from the interval of each.

    Distances to the limits add up like standard errors (MOVER; Zou and Donner 2008).
    """
    mean = math.fsum(estimates) / len(estimates)
    below, above = (
        math.hypot(*(one - limits[side] for one, limits in zip(estimates, intervals, strict=True)))
        / len(estimates)
        for side in (0, 1)
    )
    return mean - below, mean + above
