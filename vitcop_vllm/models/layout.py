"""Grids of an image's or a video's visual tokens, and the part of the image that they cover."""

from dataclasses import dataclass

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
