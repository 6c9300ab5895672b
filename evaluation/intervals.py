"""95 % intervals of accuracies and of their differences.

All are in closed form: the same figures give the same interval. Unlike a bootstrap's, they have a
width above 0 even if all answers are right, or none changed.
"""

import math
from collections.abc import Sequence

Interval = tuple[float, float]

_Z = 1.959963984540054
"""Standard normal quantile of 0.975."""


def wilson(proportion: float, trials: int) -> Interval:
    """Wilson's score interval of a proportion seen in independent trials.

    It is too wide for scores between 0 and 1, which vary less than right and wrong.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    z2 = _Z * _Z / trials
    centre = (proportion + z2 / 2) / (1 + z2)
    half = math.sqrt(proportion * (1 - proportion) * z2 + z2 * z2 / 4) / (1 + z2)
    # Rounding may cross 0 and 1.
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Interval of the mean of ``scores`` minus that of ``baseline``, on the same examples.

    Newcombe's method 10 (1998) for matched proportions: combines the Wilson intervals of both by
    their correlation. It is too wide for scores between 0 and 1.
    """
    trials = len(scores)
    p, q = math.fsum(scores) / trials, math.fsum(baseline) / trials
    (p_low, p_high), (q_low, q_high) = wilson(p, trials), wilson(q, trials)
    product = math.fsum(a * b for a, b in zip(scores, baseline, strict=True)) / trials
    covariance = product - p * q
    if covariance > 0:  # Newcombe's continuity correction, of half an example
        covariance = max(0.0, covariance - 0.5 / trials)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    correlation = covariance / spread if spread else 0.0

    def combined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return p - q - combined(p - p_low, q_high - q), p - q + combined(p_high - p, q - q_low)


def interval_of_mean(estimates: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Interval of the unweighted mean of independent estimates, from their intervals.

    Distances to the limits add up like standard errors (MOVER; Zou and Donner 2008).
    """
    mean = math.fsum(estimates) / len(estimates)
    below, above = (
        math.hypot(*(one - limits[side] for one, limits in zip(estimates, intervals, strict=True)))
        / len(estimates)
        for side in (0, 1)
    )
    return mean - below, mean + above
