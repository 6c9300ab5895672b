"""Compares the Triton kernels with the torch functions. ``test_kernels`` runs this file.

With ``TRITON_INTERPRET=1``, which ``kernels`` reads at import, Triton's interpreter runs the
kernels on the CPU. Otherwise they are compiled for a GPU.
"""

import os

import pytest
import torch

from tests.pruning.places import patch_positions
from tests.pruning.test_clustering import clumps, some_patches
from tests.pruning.test_selection import HALVES, some_labels, tokens_of_clusters
from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.kernels import TRITON
from vitcop_vllm.pruning.saliency import most_salient
from vitcop_vllm.pruning.selection import merge_tokens, select_stage_three, select_stage_two

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def some_norms(n):
    """(5, n): rows of random, tied, equal, zero and partly non-finite values."""
    torch.manual_seed(n)
    norms = torch.stack(
        [
            torch.rand(n),
            torch.randint(1, 4, (n,)).float(),
            torch.ones(n),
            torch.zeros(n),
            torch.rand(n),
        ]
    )
    norms[4, ::3] = torch.nan
    norms[4, 1::5] = torch.inf
    return norms.to(DEVICE)


SIZES = [  # n1, K, n2
    (1, 1, 1),
    (17, 5, 17),
    (40, 12, 1),
    (40, 12, 11),
    (40, 12, 12),
    (40, 12, 13),
    (40, 12, 39),
    (32, 32, 7),
    (65, 33, 50),
    (172, 20, 77),
]


@pytest.mark.parametrize(("n1", "num_centres", "n2"), SIZES)
def test_stage_two_selections_are_equal(n1, num_centres, n2):
    norms = some_norms(n1)
    labels = [some_labels(n1, num_centres, seed, skew=seed % 3) for seed in range(5)]
    args = (norms, torch.stack(labels).to(DEVICE), num_centres, n2)
    wanted = select_stage_two(*args)
    got = TRITON.select_stage_two(*args)
    for field, result, expected in zip(wanted._fields, got, wanted, strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected), field


@pytest.mark.parametrize("step", [1.0, -1.0], ids=["ascending", "descending"])
@pytest.mark.parametrize(("sizes", "n2", "whole"), HALVES)
def test_exact_halves_of_quotas_round_as_in_float32(sizes, n2, whole, step):
    norms, labels = tokens_of_clusters(sizes, [100.0 + step * k for k in range(len(sizes))])
    got = TRITON.select_stage_two(norms.to(DEVICE), labels.to(DEVICE), len(sizes), n2)
    kept = labels[got.groups.cpu() == len(sizes)]
    assert kept.bincount(minlength=len(sizes)).tolist() == list(whole)


@pytest.mark.parametrize(
    ("n1", "num_centres", "n2", "dtype"),
    [(1, 1, 1, torch.float32), (40, 3, 9, torch.bfloat16), (40, 12, 4, torch.float32)],
)
def test_merged_rows_are_close_and_unmerged_rows_equal(n1, num_centres, n2, dtype):
    torch.manual_seed(n1)
    labels = torch.stack([some_labels(n1, num_centres, seed) for seed in range(2)])
    selection = select_stage_two(torch.rand(2, n1), labels, num_centres, n2)
    selection = type(selection)(*(field.to(DEVICE) for field in selection))
    hidden = torch.randn(2, n1, 520, dtype=dtype, device=DEVICE)
    wanted = merge_tokens(hidden, selection)
    got = TRITON.merge_tokens(hidden, selection)
    assert got.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(got, wanted, rtol=rtol, atol=1e-6)
    for image in range(2):
        whole = torch.ones(n2, dtype=torch.bool, device=DEVICE)
        whole[selection.merged[image]] = False
        assert torch.equal(got[image, whole], wanted[image, whole])


@pytest.mark.parametrize(("n", "count"), [(1, 1), (33, 32), (128, 77)])
def test_rankings_are_equal(n, count):
    values = some_norms(n)
    assert torch.equal(TRITON.select_stage_three(values, count), select_stage_three(values, count))
    assert torch.equal(TRITON.most_salient(values, count), most_salient(values, count))


def assert_labels_agree(features, index, side, num_centres, *options):
    places = patch_positions(index, side, side).to(DEVICE)
    args = (features.to(DEVICE), places, num_centres, *options)
    assert torch.equal(TRITON.cluster_labels(*args), cluster_labels(*args))


@pytest.mark.parametrize(
    ("n", "num_centres", "radius"),
    [(1, 1, 0.6), (2, 1, 0.0), (40, 40, 0.2), (65, 7, 0.1), (130, 20, 0.6)],
)
def test_labels_are_equal(n, num_centres, radius):
    features = torch.stack([clumps(n, 32, seed) for seed in range(2)])
    index = torch.stack([some_patches(n, 14, 14, seed) for seed in range(2)])
    assert_labels_agree(features, index, 14, num_centres, 7.0, radius)


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_equal_when_tokens_tie(seed):
    torch.manual_seed(seed)
    features = 4.0 * torch.randint(-2, 3, (2, 49, 2))
    features[1] = 0.1
    index = torch.arange(49).expand(2, -1)
    assert_labels_agree(features, index, 7, 1 + 12 * seed, 8.0, [0.3, 0.6][seed % 2])


def test_long_chains_end_at_their_centre():
    steps = torch.arange(60)
    features = torch.cat([torch.zeros(10), 100 + steps + steps.square() / 100])[None, :, None]
    assert_labels_agree(features, torch.zeros(1, 70), 1, 2, 1.0)


def test_labels_stay_in_range_when_features_are_not_finite():
    features = clumps(60, 16, seed=2).view(2, 30, 16).to(DEVICE)
    features[0, 4] = torch.nan
    features[1, 4, 3] = torch.inf
    places = patch_positions(torch.arange(30).expand(2, 30), 5, 6).to(DEVICE)
    for image in TRITON.cluster_labels(features, places, 6):
        assert image.unique().tolist() == list(range(6))
