"""Confidence bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta  # type: ignore[import-untyped]

from vitcop_server.calibrate.bounds import lower_bound, trials_needed

TRIALS = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(TRIALS, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_bound_equals_scipy_s(sample: tuple[int, int], confidence: float) -> None:
    successes, trials = sample
    expected = beta.ppf(1 - confidence, successes, trials - successes + 1) if successes else 0.0
    assert lower_bound(successes, trials, confidence) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_no_share(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        lower_bound(successes, trials, 0.95)


@pytest.mark.parametrize(
    ("share", "failures", "needed"),
    [(0.99, 0, 299), (0.99, 1, 473), (0.95, 0, 59), (0.9, 0, 29), (0.5, 0, 5)],
)
def test_images_needed(share: float, failures: int, needed: int) -> None:
    """Wilks's sample sizes."""
    assert trials_needed(share, 0.95, failures) == needed
    assert lower_bound(needed - failures, needed, 0.95) >= share
    assert lower_bound(needed - 1 - failures, needed - 1, 0.95) < share
