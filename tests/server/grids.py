"""A model with a visual token per 28 x 28 pixels, without a server or weights."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from PIL.Image import Image

from vitcop_server.preview import Preview
from vitcop_server.usage import PrunedModel
from vitcop_vllm.models.layout import ImageLayout
from vitcop_vllm.pruning.amount import Amount
from vitcop_vllm.pruning.detail import dense_share
from vitcop_vllm.pruning.grids import Grid, largest_grid
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

NUM_LAYERS = 28
UNIT = 28


class GridInfo:
    """Replaces the processing info of a model whose grid depends on the image's size.

    Attributes:
        reads_cls: Whether the encoder has [CLS].
        tiled: Whether an image also has a coarse grid, and its other grid has row marks.
        coarse_last: Whether the coarse grid is the last.
    """

    reads_cls = False
    tiled = False
    coarse_last = False

    def __init__(self, settings: PruningSettings | None = None) -> None:
        self.settings = settings or PruningSettings()

    def layout(self, width: int, height: int) -> ImageLayout:
        if max(width, height) > 200 * min(width, height):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        box = (0.0, 0.0, float(width), float(height))
        rows, columns = math.ceil(height / UNIT), math.ceil(width / UNIT)
        if self.tiled:
            grids = Grid(3, 3), Grid(rows, columns, row_marks=True)
            return ImageLayout(grids[::-1] if self.coarse_last else grids, box)
        return ImageLayout((Grid(rows, columns),), box)

    def detailed_layout(self, image: Image, width: int, height: int) -> ImageLayout:
        layout = self.layout(width, height)
        return replace(layout, dense_share=dense_share(image, largest_grid(layout.grids)))

    def counts(self, num_tokens: int, amount: Amount) -> VisualTokenCounts:
        ratio = amount.ratio(num_tokens, None)
        return plan_counts(self.settings, ratio, NUM_LAYERS, num_tokens)

    def get_image_size_with_most_features(self) -> Any:
        return SimpleNamespace(width=128 * UNIT, height=128 * UNIT)


def grid_preview(**settings: Any) -> Preview:
    """The model's plans with these pruning settings."""
    chosen = PruningSettings(**settings)
    return Preview(PrunedModel(chosen, NUM_LAYERS, ("grid",)), GridInfo(chosen), kv_bytes=100)
