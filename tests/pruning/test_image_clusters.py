"""Clusters of images of any size."""

from functools import partial

import pytest
import torch

from tests.pruning.places import patch_positions
from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.image_clusters import (
    MAX_CLUSTERED_TOKENS,
    label_images,
    rms_distance,
)
from vitcop_vllm.pruning.settings import PruningSettings

DEFAULTS = PruningSettings()
label = partial(label_images, cluster_labels)


def features_of(num_tokens: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, num_tokens, 16, generator=torch.Generator().manual_seed(num_tokens))


def all_of(rows: int, columns: int, batch: int = 2) -> torch.Tensor:
    return torch.arange(rows * columns).expand(batch, -1)


def test_rms_distance_is_over_all_ordered_pairs():
    features = features_of(30)
    expected = torch.cdist(features.double(), features.double()).square().mean(dim=(1, 2)).sqrt()
    torch.testing.assert_close(rms_distance(features), expected.float())


def test_an_absolute_density_scale_is_not_changed():
    features, index = features_of(60), all_of(6, 10)
    expected = cluster_labels(features, patch_positions(index, 6, 10), 7, density_scale=3.0)
    assert torch.equal(label(DEFAULTS, features, index, (Grid(6, 10),), 7, 3.0), expected)
    chosen = PruningSettings(density_scale=3.0)
    assert torch.equal(label(chosen, features, index, (Grid(6, 10),), 7, 8.0), expected)


def test_without_a_scale_labels_do_not_depend_on_the_features_magnitude():
    features, index = features_of(60), all_of(6, 10)
    labels = label(DEFAULTS, features, index, (Grid(6, 10),), 7, None)
    assert torch.equal(label(DEFAULTS, features * 4, index, (Grid(6, 10),), 7, None), labels)
    scale = float(rms_distance(features[:1])) * DEFAULTS.relative_density_scale
    absolute = PruningSettings(density_scale=scale)
    assert torch.equal(
        label(absolute, features[:1], index[:1], (Grid(6, 10),), 7, None), labels[:1]
    )


def test_equal_features_do_not_divide_by_zero():
    labels = label(DEFAULTS, torch.ones(1, 12, 4), all_of(3, 4, 1), (Grid(3, 4),), 3, None)
    assert {*labels.flatten().tolist()} == {0, 1, 2}


@pytest.mark.parametrize(("grid", "num_centres"), [((40, 60), 288), ((1, 2100), 3), ((50, 41), 1)])
def test_a_large_image_is_clustered_in_blocks(grid, num_centres):
    rows, columns = grid
    index = all_of(rows, columns, 1)
    assert index.shape[1] > 2 * MAX_CLUSTERED_TOKENS - 1
    labels = label(
        DEFAULTS, features_of(rows * columns, 1), index, (Grid(*grid),), num_centres, 8.0
    )
    assert {*labels.flatten().tolist()} == {*range(num_centres)}


def test_an_image_has_the_same_clusters_in_any_batch():
    features, index = features_of(2304), all_of(48, 48)
    both = label(DEFAULTS, features, index, (Grid(48, 48),), 200, None)
    for i in range(2):
        alone = label(DEFAULTS, features[i : i + 1], index[i : i + 1], (Grid(48, 48),), 200, None)
        assert torch.equal(both[i : i + 1], alone)
