"""Stage I on images of one encoder run."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.pruning.every_selector import SELECTORS
from tests.pruning.test_selectors import IN_ENCODER, images
from vitcop_vllm.models.stage_one import ImageShape, StageOne
from vitcop_vllm.pruning.grids import Grid
from vitcop_vllm.pruning.kernel_set import TORCH
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings

SHAPE = ImageShape(VisualTokenCounts(35, 0, (11, 11, 11)), (Grid(5, 7),))


@pytest.mark.parametrize("name", IN_ENCODER)
def test_the_reported_saliency_is_that_of_the_selection_and_computed_once(name):
    computed: list[torch.Tensor] = []

    def mean_over_ranks(saliency: torch.Tensor) -> torch.Tensor:
        computed.append(saliency)
        return saliency

    view = replace(images(), mean_over_ranks=mean_over_ranks)
    selector = SELECTORS[name]
    stage_one = StageOne(selector, PruningSettings(), TORCH, None)
    numbers: Any = range(3)
    kept = stage_one.keep({SHAPE: numbers}, lambda *_: view)[SHAPE]
    selections = kept.of_images()
    assert torch.equal(torch.stack([selection.patches for selection in selections]), kept.index)
    if selector.saliency_source(has_cls=True) is None:
        assert len(computed) == selector.reads_layer, "read once, or not at all"
        assert kept.saliency is None
        assert all(selection.saliency is None for selection in selections)
        return
    assert len(computed) == 1
    assert kept.saliency is computed[0]
    for selection in selections:
        assert selection.saliency is not None
        best = selection.saliency.argsort(descending=True, stable=True)[:11]
        assert selection.patches.tolist() == sorted(best.tolist())


@pytest.mark.parametrize(("signal", "source"), [(None, "cls"), ("cls", "cls"), ("received",) * 2])
def test_encoder_signal_chooses_what_stage_one_ranks_by(signal, source):
    view = images()
    counts = VisualTokenCounts(35, 3, (11, 7, 2))
    shape, numbers = ImageShape(counts, (Grid(5, 7),)), range(3)
    settings = PruningSettings(encoder_signal=signal)
    stage_one = StageOne(SELECTORS["vitcop"], settings, TORCH, None)
    kept = stage_one.keep({shape: numbers}, lambda *_: view)[shape]
    assert kept.saliency is not None
    assert torch.equal(kept.saliency, view.saliency(source))
    assert not torch.equal(view.saliency("cls"), view.saliency("received"))


def test_kept_tokens_have_the_order_of_the_prompt():
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    numbers = range(3)
    stage_one = StageOne(SELECTORS["cls"], PruningSettings(selector="cls"), TORCH, None)
    plain, ordered = (
        stage_one.keep({SHAPE: numbers}, lambda *_: view)[SHAPE].index.tolist()  # noqa: B023
        for view in (images(), replace(images(), prompt_order=order))
    )
    for index, expected in zip(ordered, plain, strict=True):
        assert index == sorted(expected, key=order.tolist().__getitem__)
