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
        assert not computed
        assert kept.saliency is None
        assert all(selection.saliency is None for selection in selections)
        return
    assert len(computed) == 1
    assert kept.saliency is computed[0]
    for selection in selections:
        assert selection.saliency is not None
        best = selection.saliency.argsort(descending=True, stable=True)[:11]
        assert selection.patches.tolist() == sorted(best.tolist())
