"""A lower confidence bound for a share, and the sample that a share needs.

The bound is Clopper and Pearson's (1934), one-sided and exact: if the true share is below it, a
sample as good as this one has a probability of at most ``1 - confidence``. SciPy is not needed.
"""

import math
from itertools import accumulate

_STEPS = 60
"""Halvings of [0, 1]; more than a float's precision."""


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The largest share that ``successes`` of ``trials`` prove.

    Args:
        successes: From 0 to ``trials``.
        trials: Independent trials, 1 or more.
        confidence: Such as 0.95.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no share")
    risk = 1 - confidence
    if successes == trials:
        return float(risk ** (1 / trials))
    low, high = 0.0, successes / trials
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _tail(successes, trials, middle) <= risk:
            low = middle
        else:
            high = middle
    return low


def trials_needed(share: float, confidence: float, failures: int = 0) -> int:
    """The fewest trials that prove ``share`` (below 1) although ``failures`` of them fail."""
    low, high = failures, failures + 1
    while lower_bound(high - failures, high, confidence) < share:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if lower_bound(middle - failures, middle, confidence) < share:
            low = middle
        else:
            high = middle
    return high


def _tail(successes: int, trials: int, share: float) -> float:
    """Probability of ``successes`` or more in ``trials``."""
    failures = trials - successes
    if share <= 0:
        return float(successes == 0)
    # Summed over the failures, of which there are few here: (n over k) p^(n-k) (1-p)^k.
    odds = math.log1p(-share) - math.log(share)
    steps = (math.log(trials - k) - math.log(k + 1) + odds for k in range(failures))
    logs = accumulate(steps, initial=trials * math.log(share))
    return min(1.0, math.fsum(map(math.exp, logs)))
