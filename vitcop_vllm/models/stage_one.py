"""Stage I on the images of one encoder run: which visual tokens are kept, and their clusters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.pruning.grids import Grids
from vitcop_vllm.pruning.image_clusters import label_images
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.plan import STAGES, VisualTokenCounts
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.settings import PruningSettings
from vitcop_vllm.pruning.views import EncoderView
from vitcop_vllm.worker.explain import PatchSelection


class ImageShape(NamedTuple):
    """What images have in common that are selected together.

    Attributes:
        counts: What is kept of each.
        grids: Grids of its visual tokens.
    """

    counts: VisualTokenCounts
    grids: Grids


class VideoShape(NamedTuple):
    """A video, whose frames are selected like images.

    Attributes:
        frame: Shape of each frame.
        num_frames: Number of frames, as the encoder computes them.
        first: Counts of the first frame, if they differ from those of the others.
        tail: Visual tokens after the last frame, which belong to no frame and are never dropped.
    """

    frame: ImageShape
    num_frames: int
    first: VisualTokenCounts | None = None
    tail: int = 0

    @property
    def frames(self) -> list[ImageShape]:
        """Shape of each frame in turn."""
        first = self.frame if self.first is None else self.frame._replace(counts=self.first)
        return [first, *[self.frame] * (self.num_frames - 1)]

    @property
    def num_kept(self) -> int:
        """n1 of all frames together."""
        return sum(frame.counts.stages[0] for frame in self.frames)


@dataclass(frozen=True)
class KeptTokens:
    """What Stage I keeps of B images of one shape.

    Attributes:
        index: (B, n1) int64, the visual tokens that are kept, numbered as the grids have them, in
            the order of the prompt.
        labels: (B, n1) int64 cluster labels of these; ``None`` without centres.
        saliency: (B, V) float32 that the selector ranked all visual tokens by, higher is more
            salient; ``None`` if it ranks by none.
    """

    index: torch.Tensor
    labels: torch.Tensor | None
    saliency: torch.Tensor | None

    def of_images(self) -> list[PatchSelection]:
        """The selection of each image."""
        return [
            PatchSelection(
                index,
                None if self.labels is None else self.labels[i],
                None if self.saliency is None else self.saliency[i],
            )
            for i, index in enumerate(self.index)
        ]


Groups = Mapping[ImageShape, Sequence[int]]
"""Numbers of the images of each shape, ascending."""

Kept = Mapping[ImageShape, KeptTokens]
"""What is kept of each shape; shapes of unpruned images are absent."""

ViewOf = Callable[[ImageShape, Sequence[int]], EncoderView]
"""Makes the view of the images of a shape."""


def group_by_shape(images: Sequence[ImageShape]) -> dict[ImageShape, list[int]]:
    """Numbers of the images of each shape, ascending."""
    groups: dict[ImageShape, list[int]] = {}
    for number, shape in enumerate(images):
        groups.setdefault(shape, []).append(number)
    return groups


def select_items(items: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """``items`` of some images, (B, ...); of all of them without a copy."""
    if len(numbers) == items.shape[0]:
        return items
    return items[async_tensor_h2d(torch.tensor(numbers), device=items.device)]


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, V, C) rows at (B, n) indices: (B, n, C)."""
    # Not gather: on a CPU, looking up whole rows is many times faster than each number.
    return rows[torch.arange(index.shape[0], device=index.device)[:, None], index]


def no_embeddings_yet() -> torch.Tensor:
    """``EncoderView.embed`` of a view that is made before the images are encoded."""
    raise AssertionError("the selector reads embeddings before there are any")


@dataclass(frozen=True)
class StageOne:
    """Selects and clusters the visual tokens of images.

    Attributes:
        selector: Selects the tokens.
        settings: The operator's.
        kernels: Implementation of the functions that select tokens.
        published_density_scale: d_c that is published for the model's family, if any.
    """

    selector: Selector
    settings: PruningSettings
    kernels: KernelSet
    published_density_scale: float | None

    def keep(
        self,
        groups: Groups,
        view_of: ViewOf,
        changed: Sequence[torch.Tensor] | None = None,
    ) -> dict[ImageShape, KeptTokens]:
        """What is kept of the pruned images.

        Args:
            groups: Numbers of the images by shape.
            view_of: Makes the view of the images of a shape.
            changed: Of each image (V,) bool, see ``EncoderView.changed``; ``None`` if the images
                are no frames, or if frames are not compared.
        """
        kept = {}
        with SELECTION_SECONDS.labels(STAGES[0]).time():
            for shape, numbers in groups.items():
                if not shape.counts.is_pruned:
                    continue
                view = view_of(shape, numbers)
                if self.settings.encoder_signal == "received":
                    view = replace(view, reads_cls=False)
                if changed is not None:
                    of_shape = torch.stack([changed[number] for number in numbers])
                    view = replace(view, changed=of_shape)
                index, saliency = self.selector.select_in_encoder(view, shape.counts.stages[0])
                if view.prompt_order is not None:
                    index = index.gather(1, view.prompt_order[index].argsort(dim=1))
                labels = self._labels(view, index, shape) if shape.counts.centres else None
                kept[shape] = KeptTokens(index, labels, saliency)
        return kept

    def _labels(self, view: EncoderView, index: torch.Tensor, shape: ImageShape) -> torch.Tensor:
        return label_images(
            self.kernels.cluster_labels,
            self.settings,
            view.concat_over_ranks(gather_rows(view.features(), index)),
            index,
            shape.grids,
            shape.counts.centres,
            self.published_density_scale,
        )
