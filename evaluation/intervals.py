"""Estimates with 95 % intervals.

All are in closed form: the same scores give the same interval. Unlike a bootstrap's, it has a width
above 0 even if all answers are right, or none changed.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

_Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A value, and the limits of its interval."""

    value: float
    low: float
    high: float


def mean_score(scores: Sequence[float]) -> Estimate:
    """Mean of independent scores from 0 to 1, with Wilson's score interval.

    The interval is too wide for scores between 0 and 1, which vary less than right and wrong.
    """
    trials, p = len(scores), fmean(scores)
    z2 = _Z * _Z / trials
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(p * (1 - p) * z2 + z2 * z2 / 4) / (1 + z2)
    # Rounding may cross 0 and 1.
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of ``scores`` minus that of ``baseline``, on the same examples.

    The interval is Newcombe's method 10 (1998) for matched proportions: it combines the Wilson
    intervals of both by their correlation. It is too wide for scores between 0 and 1.
    """
    (p, p_low, p_high), (q, q_low, q_high) = mean_score(scores), mean_score(baseline)
    covariance = fmean(a * b for a, b in zip(scores, baseline, strict=True)) - p * q
    if covariance > 0:  # Newcombe's continuity correction, of half an example
        covariance = max(0.0, covariance - 0.5 / len(scores))
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    correlation = covariance / spread if spread else 0.0

    def combined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    below, above = combined(p - p_low, q_high - q), combined(p_high - p, q - q_low)
    return Estimate(p - q, p - q - below, p - q + above)


def mean_of(estimates: Iterable[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates.

    Distances to the limits add up like standard errors (MOVER; Zou and Donner 2008).
    """
    every = list(estimates)
    value = fmean(one.value for one in every)
    below = math.hypot(*(one.value - one.low for one in every)) / len(every)
    above = math.hypot(*(one.high - one.value for one in every)) / len(every)
    return Estimate(value, value - below, value + above)
