"""What a batch of the small world holds, in tensors."""

from dataclasses import dataclass
from typing import Self

import torch

IGNORED = -100
"""Label of a token that is not to be learnt."""

TELLING = -1
"""Attention head that looks at what the next token tells of."""


@dataclass(frozen=True)
class BatchShape:
    """What a batch holds.

    Attributes:
        side: Height and width of an image in pixels.
        images: Images.
        text: Tokens for questions in a sequence, besides the images'; 0 for images alone.
        dropped: Shares of visual tokens that may be left out, one per batch.
        background_first: Whether those that show nothing are left out before any other;
            otherwise all are alike.
        deep_share: Share of the visual tokens left that the deep stage's layers see.
        pair_share: Share of the batches that ask about two images at once.
    """

    side: int
    images: int
    text: int = 0
    dropped: tuple[float, ...] = (0.0,)
    pair_share: float = 0.0
    background_first: bool = False
    deep_share: float = 1.0


@dataclass(frozen=True)
class Sequences:
    """Conversations about a batch's N images: S sequences of T tokens.

    Attributes:
        kept: (N, n) int64 patches whose tokens the decoder sees, ascending.
        ids, labels, positions, segments: (S, T) int64. Segment 0 is seen by all that follows,
            any other by itself; -1 is padding.
        families: (S, T) int64, where a label is an answer's: which of
            :data:`questions.FAMILIES` the question is of; -1 elsewhere.
        looks: (K, 3) int64: sequence, index of a token in it, attention head that should look
            at something there. A prompt's last token looks at each group of
            :attr:`Turn.looks` with the head of that number; a token whose next one tells of
            something (:attr:`Turn.tells`) looks at it with head :data:`TELLING`.
        looked: (K, visual tokens of a sequence) bool: where it should look.
        deep: (S, T) bool: tokens that the deep stage's layers see.
    """

    kept: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    families: torch.Tensor
    looks: torch.Tensor
    looked: torch.Tensor
    deep: torch.Tensor

    def to(self, device: torch.device) -> Self:
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Batch:
    """N images of G = side / 14 patches a side, and what there is to learn about them.

    Attributes:
        pixels: (N, side, side, 3) uint8.
        targets: Name -> (N, G*G) uint8, see :func:`~demo.drawing.patch_targets`.
        content: (N, CONTENT) float32, see :func:`~demo.dataset.content`.
        sequences: ``None`` for images alone.
    """

    pixels: torch.Tensor
    targets: dict[str, torch.Tensor]
    content: torch.Tensor
    sequences: Sequences | None = None

    def to(self, device: torch.device) -> Self:
        return type(self)(
            pixels=self.pixels.to(device),
            targets={name: target.to(device) for name, target in self.targets.items()},
            content=self.content.to(device),
            sequences=None if self.sequences is None else self.sequences.to(device),
        )
