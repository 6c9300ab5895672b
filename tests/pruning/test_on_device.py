"""Selection never makes the host wait for the GPU, and ignores the default dtype."""

from functools import partial

import pytest
import torch

from tests.device_guard import no_host_sync
from tests.pruning.every_selector import SELECTORS
from tests.pruning.places import patch_positions
from tests.pruning.test_clustering import clumps
from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.image_clusters import label_images
from vitcop_vllm.pruning.kernel_set import TORCH
from vitcop_vllm.pruning.saliency import cls_saliency, most_salient
from vitcop_vllm.pruning.selection import (
    StageTwoSelection,
    mean_key_norm,
    merge_tokens,
    select_stage_three,
    select_stage_two,
)
from vitcop_vllm.pruning.settings import PruningSettings
from vitcop_vllm.pruning.signals import SIGNALS
from vitcop_vllm.pruning.views import BoundaryView, EncoderView


@no_host_sync()
def test_stage_one_stays_on_the_device():
    query = torch.ones(2, 16, 64, device="cuda", dtype=torch.bfloat16)
    keys = torch.ones(2, 577, 16, 64, device="cuda", dtype=torch.bfloat16)
    saliency = cls_saliency(query, keys, 0.125)
    assert saliency.shape == (2, 576)
    index = most_salient(saliency, 172)
    assert index.shape == (2, 172)
    features = torch.ones(2, 172, 1024, device="cuda", dtype=torch.bfloat16)
    grids = (Grid(24, 24),)
    labels = label_images(cluster_labels, PruningSettings(), features, index, grids, 20, 8.0)
    assert labels.shape == (2, 172)


@no_host_sync()
@pytest.mark.parametrize(
    ("n1", "num_centres", "n2", "n3"), [(172, 20, 77, 15), (30, 20, 12, 1), (9, 9, 9, 9)]
)
def test_stages_two_and_three_stay_on_the_device(n1, num_centres, n2, n3):
    key_norm = mean_key_norm(torch.ones(2, n1, 8, 128, device="cuda", dtype=torch.float16))
    labels = torch.zeros(2, n1, device="cuda", dtype=torch.int64)
    selection = select_stage_two(key_norm, labels, num_centres, n2)
    assert selection.index.shape == (2, n2)
    groups = min(num_centres, n2)
    assert selection.merged.shape == (2, groups)
    assert selection.groups.shape == (2, n1)
    hidden = torch.ones(2, n1, 4096, device="cuda", dtype=torch.bfloat16)
    assert merge_tokens(hidden, selection).shape == (2, n2, 4096)
    assert select_stage_three(key_norm[:, :n2], n3).shape == (2, n3)


@no_host_sync()
@pytest.mark.parametrize("name", [name for name, row in SELECTORS.items() if row.prunes_encoder])
def test_choosing_patches_stays_on_the_device(name):
    ones = partial(torch.ones, device="cuda", dtype=torch.bfloat16)
    view = EncoderView(
        queries=lambda: ones(2, 577, 16, 64),
        cls_query=ones(2, 16, 64),
        to_tokens=lambda of_patches: of_patches,
        features=lambda: ones(2, 576, 1024),
        keys=ones(2, 577, 16, 64),
        scale=0.125,
        grids=(Grid(24, 24),),
        pixels=ones(2, 3, 336, 336),
        embed=lambda: ones(2, 576, 4096),
        mean_over_ranks=lambda x: x,
        concat_over_ranks=lambda x: x,
        kernels=TORCH,
    )
    assert SELECTORS[name].select_in_encoder(view, 64)[0].shape == (2, 64)


AT_BOUNDARY = [
    (name, signal)
    for name, row in SELECTORS.items()
    if row.shallow
    for signal in (SIGNALS if row.ranks_by_signal else ["keys"])
]


@no_host_sync()
@pytest.mark.parametrize(("name", "signal"), AT_BOUNDARY)
def test_selecting_tokens_stays_on_the_device(name, signal):
    ones = partial(torch.ones, device="cuda", dtype=torch.float16)
    view = BoundaryView(
        rows=torch.ones(2, 576, device="cuda", dtype=torch.int64),
        queries=ones(1400, 32, 128),
        keys=ones(1400, 8, 128),
        values=ones(1400, 8, 128),
        raw_keys=lambda: ones(2, 576, 8, 128),
        scale=0.09,
        hidden=lambda: ones(2, 576, 4096),
        norm_weight=ones(4096),
        prompt_rows=torch.ones(2, 2, device="cuda", dtype=torch.int64),
        labels=torch.ones(2, 576, device="cuda", dtype=torch.int64),
        num_centres=20,
        mean_over_ranks=lambda x: x,
        kernels=TORCH,
        signal=SIGNALS[signal],
    )
    chosen = SELECTORS[name].select_at(1, view, 77)
    index = chosen.index if isinstance(chosen, StageTwoSelection) else chosen
    assert index.shape == (2, 77)


@pytest.fixture
def half_precision_default():
    """Sets bfloat16 as the default dtype, as an engine does while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def all_results(query, keys, features):
    patches = EncoderView(
        queries=lambda: keys,
        cls_query=query,
        to_tokens=lambda of_patches: of_patches,
        features=lambda: features,
        keys=keys,
        scale=0.3,
        grids=(Grid(7, 10),),
        pixels=features,
        embed=lambda: keys[:, 1:].flatten(2),
        mean_over_ranks=lambda x: x,
        concat_over_ranks=lambda x: x,
        kernels=TORCH,
    )
    rows = torch.arange(30).unflatten(0, (2, 15))
    tokens = BoundaryView(
        rows=rows,
        queries=keys[0],
        keys=keys[1],
        values=keys[0],
        raw_keys=lambda: keys[1][rows],
        scale=0.3,
        hidden=lambda: keys[0].flatten(1)[rows],
        norm_weight=query[0].flatten(),
        prompt_rows=torch.tensor([[0, 15], [20, 60]]),
        labels=rows % 5,
        num_centres=5,
        mean_over_ranks=lambda x: x,
        kernels=TORCH,
        signal=SIGNALS["keys"],
    )
    others = []
    for row in SELECTORS.values():
        if row.prunes_encoder:
            others.append(row.select_in_encoder(patches, 11)[0])
        if row.shallow:
            chosen = row.select_at(1, tokens, 11)
            others += chosen if isinstance(chosen, StageTwoSelection) else [chosen]
    others += [signal.score(tokens) for signal in SIGNALS.values()]
    saliency = cls_saliency(query, keys, 0.3)
    index = most_salient(saliency, 40)
    places = patch_positions(index, 7, 10)
    labels = cluster_labels(features, places, 6)
    key_norm = mean_key_norm(keys[:, :40])
    selection = select_stage_two(key_norm, labels, 6, 20)
    merged = merge_tokens(features, selection)
    return saliency, index, places, labels, key_norm, *selection, merged, *others


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    features = torch.stack([clumps(40, 8, seed) for seed in range(2)])
    return torch.randn(2, 4, 8), torch.randn(2, 71, 4, 8), features


@pytest.fixture
def usual_results(inputs):
    return all_results(*inputs)


@pytest.mark.usefixtures("half_precision_default")
def test_results_do_not_depend_on_the_default_dtype(usual_results, inputs):
    for usual, now in zip(usual_results, all_results(*inputs), strict=True):
        assert usual.dtype == now.dtype
        assert torch.equal(usual, now)
