"""The search of a grid."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcop_server.calibrate.search import search

GRID = [number / 20 for number in range(1, 20)]

GRIDS = st.integers(1, 19).map(lambda length: GRID[:length])


class Passes:
    """Records the ratios that are asked."""

    def __init__(self, results: dict[float, bool]) -> None:
        self.results = results
        self.asked: list[float] = []

    def __call__(self, ratio: float) -> bool:
        self.asked.append(ratio)
        return self.results[ratio]


@given(GRIDS, st.integers(0, 19))
def test_a_steady_fall_is_found_with_few_ratios(grid: list[float], count: int) -> None:
    passes = Passes({ratio: place < count for place, ratio in enumerate(grid)})
    found = search(grid, passes)
    assert found.ratio == ([0.0, *grid][min(count, len(grid))])
    assert found.is_monotone
    assert len(passes.asked) == len(set(passes.asked))
    assert len(passes.asked) <= math.ceil(math.log2(len(grid) + 1)) + 2


@given(GRIDS, st.data())
def test_known_ratios_are_not_asked_twice_and_change_nothing(
    grid: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(grid)))
    results = {ratio: place < count for place, ratio in enumerate(grid)}
    known = data.draw(st.lists(st.sampled_from(grid), unique=True))
    passes = Passes(results)
    assert search(grid, passes, known) == search(grid, Passes(results))
    assert len(passes.asked) == len(set(passes.asked))


@given(GRIDS, st.data())
def test_no_ratio_is_found_above_a_failure_that_was_asked(
    grid: list[float], data: st.DataObject
) -> None:
    size = len(grid)
    results = dict(
        zip(grid, data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), strict=True)
    )
    passes = Passes(results)
    found = search(grid, passes)
    failures = [ratio for ratio in passes.asked if not results[ratio]]
    assert found.ratio < min(failures, default=1.0)
    assert found.is_monotone or set(passes.asked) == set(grid)


def test_a_dip_beside_the_found_ratio_is_seen() -> None:
    """Bisection alone asks 2, 6 and 4 of 1 to 7, and would find 5."""
    grid = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    results = dict(zip(grid, [True, True, False, True, True, False, False], strict=True))
    found = search(grid, Passes(results), [0.4, 0.5, 0.6, 0.3])
    assert (found.ratio, found.is_monotone) == (0.2, False)
    found = search(grid, Passes(results | {0.4: False, 0.5: True, 0.3: True}))
    assert (found.ratio, found.is_monotone) == (0.3, False)


@pytest.mark.parametrize("scan", [False, True])
def test_a_scan_asks_everything(scan: bool) -> None:
    passes = Passes(dict.fromkeys(GRID, True))
    assert search(GRID, passes, scan=scan).ratio == GRID[-1]
    assert (set(passes.asked) == set(GRID)) == scan
