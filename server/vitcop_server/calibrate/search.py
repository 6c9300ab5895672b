"""Finds the highest ratio of a grid that passes, with few ratios asked.

The search is by bisection, which assumes that agreement falls as the ratio rises. It checks this
where the answer depends on it: it also asks at the ratios beside the two that it stops between. If
any ratio passes above one that fails, it asks at all ratios.

A ratio is found only if every lower ratio that was asked passes too. With ``scan`` this is a test
in a fixed order that stops at the first failure: its risk of a wrong proof is that of one test,
however many ratios are asked. Bisection has the same risk if agreement falls as assumed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        ratio: The highest ratio at which, and below which, all asked ratios pass. 0 if none does.
        is_monotone: Whether no asked ratio passes above one that fails.
    """

    ratio: float
    is_monotone: bool


def search(
    grid: Sequence[float],
    passes: Callable[[float], bool],
    known: Iterable[float] = (),
    *,
    scan: bool = False,
) -> Found:
    """Search a grid.

    Args:
        grid: Ratios above 0, ascending. Ratio 0 passes always.
        passes: Whether a ratio passes; asks the server if it must.
        known: Ratios of the grid that were asked already.
        scan: Ask at all ratios.
    """
    asked = {ratio: passes(ratio) for ratio in (grid if scan else known)}
    if not scan:
        _bisect(grid, passes, asked)
        if not _is_monotone(asked):
            asked |= {ratio: passes(ratio) for ratio in grid if ratio not in asked}
    found = 0.0
    for ratio in sorted(asked):
        if not asked[ratio]:
            break
        found = ratio
    return Found(found, _is_monotone(asked))


def _bisect(
    grid: Sequence[float], passes: Callable[[float], bool], asked: dict[float, bool]
) -> None:
    """Ask until the highest pass and the lowest failure are neighbours; then beside these."""

    def result(place: int) -> bool:
        ratio = grid[place]
        if ratio not in asked:
            asked[ratio] = passes(ratio)
        return asked[ratio]

    failing = [place for place, ratio in enumerate(grid) if asked.get(ratio) is False]
    high = min(failing, default=len(grid))
    low = max((place for place in range(high) if asked.get(grid[place])), default=-1)
    while high - low > 1:
        middle = (low + high) // 2
        if result(middle):
            low = middle
        else:
            high = middle
    for place in (low - 1, high + 1):
        if 0 <= place < len(grid):
            result(place)


def _is_monotone(asked: Mapping[float, bool]) -> bool:
    results = [asked[ratio] for ratio in sorted(asked)]
    return results == sorted(results, reverse=True)
