"""What the training program asks of the model that it trains: LLaVA-1.5's form or Qwen2.5-VL's."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from demo.drawing import Cells, Grid, patch_targets
from demo.world import Rng, Scene, Size

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frame:
    """Sizes of a batch's images, which are all equal.

    Attributes:
        size: Width and height of the scene in pixels.
        rows, columns: Visual tokens.
        merge: Patches along a side of a visual token.
        patch: Pixels along a side of a patch, after the image is resized to whole patches.
    """

    size: Size
    rows: int
    columns: int
    merge: int
    patch: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def cells(self) -> Cells:
        return Cells(self.size, self.rows * self.merge, self.columns * self.merge)

    @property
    def pixels(self) -> Size:
        """Width and height of the resized image."""
        return self.cells.columns * self.patch, self.cells.rows * self.patch

    def by_token(self, grid: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(tokens, merge^2) values of a grid of patches."""
        blocks = grid.reshape(self.rows, self.merge, self.columns, self.merge)
        return blocks.swapaxes(1, 2).reshape(self.tokens, self.merge**2)


@dataclass(frozen=True)
class Seen:
    """Output of the vision tower for N images.

    Attributes:
        tokens: (N, V, width), in which heads recognise what the patches show.
        summaries: (N, width) outputs of [CLS], in which heads recognise what the image shows.
    """

    tokens: Tensor
    summaries: tuple[Tensor, ...] = ()


class Form(ABC):
    """A kind of model: its prompts, its images, and how transformers' module is called."""

    image: ClassVar[str]
    """Placeholder token of a visual token."""

    around: ClassVar[tuple[str, str]]
    """Text before and after the placeholders of an image."""

    tower: ClassVar[str]
    """Part of the names of the vision tower's weights."""

    matrices: ClassVar[tuple[str, ...]]
    """Parts of the names of the weights whose matrices Muon trains."""

    tower_targets: ClassVar[tuple[str, ...]]
    """Targets of patches that a head finds in the tower's output."""

    decoder_targets: ClassVar[tuple[str, ...]]
    """Targets of patches that a head finds in the decoder's visual tokens."""

    merge: int
    layers: int
    """Layers of the decoder."""

    tower_width: int
    """Width of :attr:`Seen.tokens`."""

    width: int
    """Width of the decoder."""

    num_summaries: int

    @abstractmethod
    def build(self, folder: Path, corpus: Iterable[str], seed: int) -> tuple[nn.Module, Any]:
        """The model before training and its tokenizer. Writes its configuration to a folder."""

    @abstractmethod
    def frame(self, side: int, rng: Rng) -> Frame:
        """Sizes for a batch's images with about the area of a square of ``side`` pixels."""

    def targets(self, scene: Scene, frame: Frame) -> dict[str, Grid]:
        """Target -> classes of the patches, as :func:`~demo.drawing.patch_targets`."""
        return patch_targets(scene, frame.cells)

    @abstractmethod
    def positions(self, ids: Sequence[int], image: int, kept: Ints, frame: Frame) -> Ints:
        """(dimensions, tokens + 1) positions of a sequence's beginning and of the token after it.

        Args:
            ids: The beginning, with a placeholder for each kept visual token.
            image: Id of the placeholder.
            kept: (images, kept) visual tokens in the sequence.
            frame: Sizes of its images.
        """

    @abstractmethod
    def see(self, model: Any, pixels: Tensor) -> Seen:
        """Run the vision tower on (N, height, width, 3) pixels from 0 to 255."""

    @abstractmethod
    def embed(self, model: Any, tokens: Tensor) -> Tensor:
        """(N, n, hidden) inputs of the decoder for some of :attr:`Seen.tokens`."""

    def parts(self, model: Any) -> list[nn.Module]:
        """Layers to compile."""
        return [*model.model.language_model.layers]
