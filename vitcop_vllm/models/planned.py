"""What is planned for a request's images and videos: computed once, and handed through vLLM."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from vitcop_vllm.models.layout import VideoLayout
from vitcop_vllm.models.stage_one import ImageShape, VideoShape

PLANNED_KEY = "pruning_planned"
"""Processor keyword with the request's :class:`PlannedItems`, from the processor to itself."""


class PlannedVideo(NamedTuple):
    """A video's shape and layout."""

    shape: VideoShape
    layout: VideoLayout


class PlannedItems(NamedTuple):
    """A request's images and videos, each in the request's order."""

    images: Sequence[ImageShape]
    videos: Sequence[PlannedVideo]

    def missing(self, is_cached: Mapping[str, Iterable[bool]]) -> "PlannedItems":
        """The images and videos that are not cached.

        Args:
            is_cached: Whether each is, by modality.
        """

        def missing(items: Sequence[Any], modality: str) -> list[Any]:
            return [*compress(items, (not cached for cached in is_cached.get(modality, ())))]

        return PlannedItems(missing(self.images, "image"), missing(self.videos, "video"))


def planned_items(processor_kwargs: Mapping[str, object]) -> PlannedItems:
    """The images and videos of a request, or those of them that vLLM has not cached."""
    planned = processor_kwargs[PLANNED_KEY]
    assert isinstance(planned, PlannedItems)
    return planned
