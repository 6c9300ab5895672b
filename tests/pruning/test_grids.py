"""Places of an image's visual tokens in its grids."""

import numpy as np
import pytest

from tests.pruning import oracle
from vitcop_vllm.pruning.grids import Grid, count_tokens, token_places


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (5, 7), (1, 9), (9, 1)])
def test_positions_are_fractions_of_height_and_width(rows, columns):
    places = token_places((Grid(rows, columns),))
    assert places.positions.dtype == np.float32
    assert (places.positions >= 0).all()
    assert (places.positions < 1).all()
    expected = oracle.positions(range(rows * columns), rows, columns)
    np.testing.assert_array_equal(places.positions, np.array(expected))
    assert not places.is_mark.any()


def test_positions_are_row_major():
    positions = token_places((Grid(5, 7),)).positions
    expected = [[0, 6 / 7], [1 / 5, 0], [2 / 5, 6 / 7], [4 / 5, 6 / 7]]
    np.testing.assert_allclose(positions[[6, 7, 20, 34]], expected, rtol=1e-6)


def test_each_grid_covers_the_image_and_a_mark_ends_each_row():
    grids = (Grid(1, 2), Grid(2, 3, row_marks=True))
    places = token_places(grids)
    assert count_tokens(grids) == len(places.positions) == 2 + 2 * 4
    third = np.float32(1) / np.float32(3)
    np.testing.assert_array_equal(
        places.positions[2:],
        np.array([(row, c * third) for row in (0, 0.5) for c in range(4)], dtype=np.float32),
    )
    assert places.is_mark.nonzero()[0].tolist() == [5, 9]


def test_tokens_of_the_same_part_of_the_image_are_neighbours_on_the_curve():
    """A coarse token is as far on the curve as the first fine token of its part."""
    z_order = token_places((Grid(2, 2), Grid(4, 4))).z_order
    coarse, fine = z_order[:4], z_order[4:].reshape(4, 4)
    assert coarse.tolist() == fine[::2, ::2].flatten().tolist() == [0, 4, 8, 12]
    assert fine[:2, :2].flatten().tolist() == [0, 1, 2, 3]
    assert fine[2:, 2:].flatten().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("empty", [Grid(0, 0, row_marks=True), Grid(0, 5), Grid(3, 0)])
def test_a_grid_may_be_empty(empty):
    expected, got = (token_places(grids) for grids in ((Grid(2, 2),), (Grid(2, 2), empty)))
    np.testing.assert_array_equal(got.positions, expected.positions)
    assert (got.z_order.argsort() == expected.z_order.argsort()).all()


def test_a_grid_may_consist_of_marks():
    places = token_places((Grid(1, 1), Grid(2, 0, row_marks=True)))
    assert places.positions.tolist() == [[0, 0], [0, 1], [0.5, 1]]
    assert places.is_mark.tolist() == [False, True, True]
