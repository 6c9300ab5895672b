"""A training batch of the small world, as tensors."""

from dataclasses import dataclass
from typing import Self

import torch

IGNORED = -100
"""Label of a token without a loss."""

SUBJECT_HEAD = -1
"""Attention head that looks at the subject of the next token (:attr:`Turn.subjects`)."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch.

    Attributes:
        side: Height and width of an image in pixels, or of a square with about its area.
        images: Number of images.
        text: Tokens of a sequence for questions and answers; 0 makes a batch without sequences.
        dropped: Fractions of visual tokens to drop; each batch draws one.
        pair_share: Fraction of the batches whose sequences ask about two images.
        background_first: Drop patches that show nothing before other patches; otherwise drop
            random patches.
        deep_share: Fraction of the kept visual tokens that the deep stage's layers see.
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
        kept: (N, n) int64, ascending: visual tokens that the decoder sees.
        ids, labels, segments: (S, T) int64. A token sees segment 0 and its own segment.
            Segment -1 is padding.
        positions: (D, S, T) int64, D positions of a token.
        families: (S, T) int64: for tokens of an answer, the question's index in
            :data:`questions.FAMILIES`; -1 elsewhere.
        looks: (K, 3) int64: sequence, token index, attention head. The head of a prompt's last
            token is the index of a group in :attr:`Turn.looks`. The head of a token before one
            with a subject is :data:`SUBJECT_HEAD`.
        looked: (K, visual tokens of a sequence) bool: where that head should look.
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
    """N images of V visual tokens, with their training targets.

    Attributes:
        pixels: (N, height, width, 3) uint8.
        targets: Name -> (N, V, patches of a visual token) uint8, see
            :func:`~demo.drawing.patch_targets`.
        content: (N, CONTENT) float32, see :func:`~demo.dataset.content`.
        sequences: ``None`` in a batch of images without questions.
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
