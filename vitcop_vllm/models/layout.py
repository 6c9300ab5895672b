"""Grids of an image's or a video's visual tokens, and the part of the image that they cover."""

from dataclasses import dataclass
from typing import TypeVar

from vllm.utils.cache import LRUCache

from vitcop_vllm.pruning.grids import Grids, count_tokens


@dataclass(frozen=True)
class ImageLayout:
    """Layout of an image without pruning.

    Attributes:
        grids: Grids of the visual tokens. Each covers ``box``.
        box: Left, top, right, bottom of the part that the encoder sees, in pixels of the image.
        dense_share: See ``detail.dense_share``; ``None`` if nothing needs it.
    """

    grids: Grids
    box: tuple[float, float, float, float]
    dense_share: float | None = None

    @property
    def num_tokens(self) -> int:
        """V, number of visual tokens."""
        return count_tokens(self.grids)


@dataclass(frozen=True)
class VideoLayout:
    """Layout of a video without pruning.

    Attributes:
        num_frames: Number of frames, as the encoder computes them.
        grids: Grids of the visual tokens of each frame.
        num_positions: Rotary positions that the frames take, without text between them; only for
            models with M-RoPE.
        times: Of each frame, when the frames of the file that it joins are shown, in seconds;
            ``None`` if the loader does not say.
        tail: Visual tokens after the last frame, which belong to no frame.
        dense_share: See ``detail.dense_share_of_frames``; ``None`` if nothing needs it.
    """

    num_frames: int
    grids: Grids
    num_positions: int = 0
    times: tuple[tuple[float, ...], ...] | None = None
    tail: int = 0
    dense_share: float | None = None


Layout = TypeVar("Layout", ImageLayout, VideoLayout)


def layout_by_uuid(
    what: str, known: LRUCache[str, Layout], uuid: str | None, layout: Layout | None
) -> Layout:
    """The layout of an image or video, which the client may send again by its uuid only.

    vLLM caches the processed item under an identifier that ends with counts, and the counts
    follow from the layout.

    Args:
        what: ``image`` or ``video``.
        known: Layouts by uuid; ``layout`` is added.
        uuid: The client's name of it, if any.
        layout: Its layout; ``None`` if it was sent without its data.

    Raises:
        ValueError: If it was sent without its data, and its uuid is not known.
    """
    if layout is not None:
        if uuid is not None:
            known[uuid] = layout
        return layout
    earlier = known.get(uuid) if uuid is not None else None
    if earlier is None:
        raise ValueError(f"the {what} with uuid {uuid!r} is not cached: send its data again")
    return earlier
