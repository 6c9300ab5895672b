"""Towers that compute the patches of all images as the rows of one sequence."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from vitcop_vllm.models.stage_one import Groups, ImageShape, Kept


class PackedImage(NamedTuple):
    """Where the visual tokens of an image are in the tower.

    Attributes:
        first: Place of the image's first token.
        places: (V, ...) int64, places of each token of the image's grid, counted from ``first``.
    """

    first: int
    places: torch.Tensor


class AttentionInputs(NamedTuple):
    """Attention inputs of the tower's last layer; S patches of all images, in the tower's order.

    Attributes:
        query, key: (S, local heads, D), after rotary embedding.
        raw_key: (S, local heads * D), before rotary embedding.
    """

    query: torch.Tensor
    key: torch.Tensor
    raw_key: torch.Tensor


SelectRows = Callable[[AttentionInputs], torch.Tensor]
"""Returns the kept rows, (N,) int64 in [0, S)."""


def kept_places(images: Sequence[PackedImage], groups: Groups, kept: Kept) -> torch.Tensor:
    """(N, ...) places of the tokens that are embedded, image by image: all of unpruned images."""
    places = [image.places for image in images]
    for shape, tokens in kept.items():
        for number, index in zip(groups[shape], tokens.index, strict=True):
            places[number] = places[number][index]
    return torch.cat(
        [image.first + of_image for image, of_image in zip(images, places, strict=True)]
    )


def lengths_of_images(groups: Groups) -> list[int]:
    """Number of tokens that are embedded, of each image."""
    lengths = {
        number: shape.counts.stages[0] for shape, numbers in groups.items() for number in numbers
    }
    return [lengths[number] for number in range(len(lengths))]


def split_by_shape(embeddings: torch.Tensor, groups: Groups) -> Mapping[ImageShape, torch.Tensor]:
    """(N, C) embeddings, image by image, to (B, n1, C) of the images of each shape."""
    split = embeddings.split(lengths_of_images(groups))
    return {
        shape: torch.stack([split[number] for number in numbers])
        for shape, numbers in groups.items()
    }
