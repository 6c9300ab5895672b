"""Buckets of ratios in the metrics."""

import pytest

from vitcop_server.metrics import ratio_bucket


@pytest.mark.parametrize(
    ("ratio", "bucket"),
    [
        (0.0, "0"),
        (0.001, "0-0.5"),
        (0.5, "0.5-0.7"),
        (2 / 3, "0.5-0.7"),
        (7 / 9, "0.7-0.8"),
        (8 / 9, "0.8-0.9"),
        (0.9, "0.9-1"),
        (17 / 18, "0.9-1"),
    ],
)
def test_a_ratio_has_its_bucket(ratio: float, bucket: str) -> None:
    assert ratio_bucket(ratio, True) == bucket
    assert ratio_bucket(ratio, False) == "none"
