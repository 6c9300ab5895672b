"""What tests of models with tiles share: images, inputs, and the comparison with vLLM's encoder."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.models.test_llava import SIDE
from vitcop_vllm.models.stage_one import ImageShape
from vitcop_vllm.pruning.grids import Grids, count_tokens
from vitcop_vllm.pruning.plan import VisualTokenCounts

TILE = 14 * SIDE
"""Height and width of a tile in pixels."""


class Selections:
    """Takes what Stage I reports, in the place of a ``SelectionSink``."""

    def record_patches(self, selections):
        self.of_images = selections


def images_of(
    grids_of_images: Sequence[Grids], unpruned: int, selector: str, share: float = 0.4
) -> list[ImageShape]:
    """Images of which Stage I keeps a share; image number ``unpruned`` is unpruned."""
    shapes = []
    for number, grids in enumerate(grids_of_images):
        tokens = count_tokens(grids)
        counts = VisualTokenCounts.unpruned(tokens)
        if number != unpruned:
            centres = 4 if selector == "vitcop" else 0
            counts = VisualTokenCounts(tokens, centres, (int(share * tokens), 10, 3))
        shapes.append(ImageShape(counts, grids))
    return shapes


def inputs_on(
    device: torch.device, tiles_of_images: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    return {
        "pixel_values": [torch.rand(n, 3, TILE, TILE, device=device) for n in tiles_of_images],
        "image_sizes": torch.tensor(sizes),
    }


def assert_kept_tokens_equal_vllms(
    model: Any, inputs: dict[str, Any], images: list[ImageShape]
) -> torch.Tensor | None:
    """Compare the kept tokens with those of vLLM's whole encoder; the cluster labels."""
    sink: Any = Selections()
    plain, labels, _ = model.columns.split(model._embed_pruned(inputs, images, sink))
    whole = model._embed_whole(inputs)
    for shape, embedding, every, selection in zip(
        images, plain, whole, sink.of_images, strict=True
    ):
        assert len(every) == shape.counts.encoder
        index = range(len(every)) if selection is None else selection.patches.tolist()
        assert len(embedding) == shape.counts.stages[0] == len({*index})
        torch.testing.assert_close(embedding, every[index])
    return labels
