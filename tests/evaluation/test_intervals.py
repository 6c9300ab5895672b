"""Intervals against published values, and their coverage of the truth."""

import numpy as np
import pytest

from evaluation.intervals import Estimate, mean_of, mean_score, paired_difference


# Newcombe (1998), "Two-sided confidence intervals for the single proportion", method 3.
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_s_interval_against_published_values(right, total, low, high):
    scores = [1.0] * right + [0.0] * (total - right)
    assert mean_score(scores) == pytest.approx((right / total, low, high), abs=5e-5)
    mirrored = mean_score([1 - score for score in scores])
    assert mirrored[1:] == pytest.approx((1 - high, 1 - low), abs=5e-5)


def scores(both: int, first: int, second: int, neither: int) -> tuple[list[float], list[float]]:
    """Paired scores, from the numbers of examples that both, one or neither answers right."""
    return (
        [1.0] * (both + first) + [0.0] * (second + neither),
        [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither,
    )


# Newcombe (1998), "Improved confidence intervals for the difference between binomial
# proportions based on paired data", method 10; Altman et al. (2000), "Statistics with confidence".
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((14, 5, 0, 22), 0.0115, 0.2265),
    ],
)
def test_paired_difference_against_published_values(table, low, high):
    first, second = scores(*table)
    assert paired_difference(first, second)[1:] == pytest.approx((low, high), abs=5e-5)
    assert paired_difference(second, first)[1:] == pytest.approx((-high, -low), abs=5e-5)


def test_equal_scores_have_an_interval_of_positive_width():
    # 0 of 100 changed: Wilson's upper limit is about 4 %.
    value, low, high = paired_difference(*scores(100, 0, 0, 0))
    assert value == 0
    assert high == pytest.approx(mean_score([0.0] * 100).high)
    assert low == -high


def test_intervals_stay_within_bounds():
    assert mean_score([1.0] * 7).high == 1.0
    assert mean_score([0.0] * 7).low == 0.0
    assert paired_difference(*scores(0, 5, 0, 0)) == pytest.approx((1, 0.385, 1), abs=1e-3)


@pytest.mark.parametrize(("both", "first", "second"), [(0.6, 0.05, 0.2), (0.9, 0.0, 0.04)])
def test_paired_difference_covers_the_truth(both, first, second):
    rng = np.random.default_rng(0)
    tables = rng.multinomial(100, [both, first, second, 1 - both - first - second], size=2000)
    covered = 0
    for table in tables.tolist():
        _, low, high = paired_difference(*scores(*table))
        covered += low <= first - second <= high
    assert 0.93 < covered / len(tables) < 0.99


def test_the_interval_of_a_mean_narrows():
    one = Estimate(0.5, 0.4, 0.7)
    assert mean_of([one]) == pytest.approx(one)
    # Four equal estimates: half as wide. Distances below and above combine separately.
    assert mean_of([Estimate(0.5, 0.3, 0.6)] * 4) == pytest.approx((0.5, 0.4, 0.55))


def test_the_interval_of_a_mean_covers_the_truth():
    rng = np.random.default_rng(1)
    truths = np.array([0.98, 0.8, 0.5, 0.95])
    covered = 0
    for right in rng.binomial(50, truths, size=(2000, 4)).tolist():
        estimate = mean_of(mean_score([1.0] * n + [0.0] * (50 - n)) for n in right)
        covered += estimate.low <= truths.mean() <= estimate.high
    assert 0.93 < covered / 2000 < 0.975
