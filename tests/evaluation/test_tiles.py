"""Two ways to select patches of several tiles."""

import numpy as np

from evaluation.tiles import equal_quotas, ranked_together

SALIENCY = np.array([[9.0, 8, 7, 6], [5, 4, 3, 2], [1, 1, 1, 0]])


def test_patches_ranked_together_are_the_most_salient_of_all():
    assert ranked_together(SALIENCY, 5).astype(int).tolist() == [
        [1, 1, 1, 1],
        [1, 0, 0, 0],
        [0] * 4,
    ]


def test_quotas_keep_as_many_of_each_tile_and_the_count_in_all():
    kept = equal_quotas(SALIENCY, 7).astype(int)
    assert kept.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
