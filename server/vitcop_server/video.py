"""Reads the videos of requests, with limits that are checked before frames are decoded."""

from dataclasses import dataclass
from typing import Any, Self

import cv2
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders import VideoSourceMetadata
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from vitcop_server.data_urls import decode_base64
from vitcop_server.errors import RequestError
from vitcop_server.settings import ServerSettings
from vitcop_server.size_limits import ImageLimits
from vitcop_vllm.adoption import adopt_copy

PARAM = "video_url"

_FILE_SHARE = 32
"""A decoder goes through all frames up to the last that is read, so the pixels of all frames of a
file are limited too, to so many times those of the frames that are read."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits of a video's size.

    Attributes:
        frame: Limits of each frame.
        max_frames: Maximum number of frames in the file.
        max_pixels: Maximum of width times height times the number of frames that are read.
    """

    frame: ImageLimits
    max_frames: int
    max_pixels: int

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Self:
        return cls(
            ImageLimits.from_settings(settings),
            settings.max_video_frames,
            settings.max_video_pixels,
        )

    def check_file(self, num_frames: int, frame_pixels: int) -> None:
        """Refuse a file with too many frames or pixels.

        Raises:
            RequestError: The message has the limit's name and value.
        """
        if num_frames > self.max_frames:
            raise RequestError(
                f"the video has {num_frames} frames, but server.max_video_frames is "
                f"{self.max_frames}: send a shorter video, or one with fewer frames per second",
                param=PARAM,
            )
        if num_frames * frame_pixels > _FILE_SHARE * self.max_pixels:
            raise RequestError(
                f"the video has {num_frames} frames of {frame_pixels} pixels, and "
                f"server.max_video_pixels allows {_FILE_SHARE} * {self.max_pixels} pixels in a "
                "file: send a shorter or smaller video",
                param=PARAM,
            )

    def check_frames(self, num_frames: int, frame_pixels: int) -> None:
        """Refuse frames that take too much memory.

        Raises:
            RequestError: The message has the limit's name and value.
        """
        if num_frames * frame_pixels > self.max_pixels:
            raise RequestError(
                f"{num_frames} frames of {frame_pixels} pixels would be read of the video, but "
                f"server.max_video_pixels is {self.max_pixels}: send a shorter or smaller video",
                param=PARAM,
            )


class GuardedVideoIO(VideoMediaIO):
    """vLLM's video reader, with limits. Use one instance per video."""

    _limits: VideoLimits
    video_loader: Any

    @classmethod
    def adopt(cls, media_io: VideoMediaIO, limits: VideoLimits, image_io: Any) -> Self:
        """A copy of ``media_io`` with limits.

        Args:
            media_io: vLLM's reader.
            limits: The attribute.
            image_io: Reads the frames of a video that is sent as JPEG images.
        """
        guarded: Self = adopt_copy(media_io, cls)
        guarded._limits = limits
        guarded.image_io = image_io
        return guarded

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Any]:
        if media_type.lower() == "video/jpeg":
            return super().load_base64(media_type, data)
        return self.load_bytes(decode_base64(data, "video"))

    def load_bytes(self, data: bytes) -> MediaWithBytes[Any]:
        if not data:
            raise RequestError("the video is empty", param=PARAM)
        self.video_loader = _limited(self.video_loader, self._limits, self._frame_pixels(data))
        loaded = super().load_bytes(data)
        frames, _ = loaded.media
        if not len(frames):
            raise RequestError("no frame of the video can be read", param=PARAM)
        return loaded

    def _frame_pixels(self, data: bytes) -> int:
        """Pixels of a frame, as the file's header states them."""
        try:
            file = OpenCVVideoBackendMixin.open_video_capture(data)
        except ValueError:
            raise RequestError(
                "the video cannot be opened: it is cut off, or its format is unknown", param=PARAM
            ) from None
        width, height = (
            int(file.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        file.release()
        if width < 1 or height < 1:
            raise RequestError("the video has no frame that can be read", param=PARAM)
        self._limits.frame.check(width, height, "video")
        return width * height


def _limited(loader: Any, limits: VideoLimits, frame_pixels: int) -> Any:
    """A copy of vLLM's loader that checks the frames before it decodes them."""

    class Limited(type(loader)):  # type: ignore[misc]
        @classmethod
        def compute_frames_index_to_sample(
            cls, source: VideoSourceMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            if source.total_frames_num < 1:
                raise RequestError("the video has no frame that can be read", param=PARAM)
            limits.check_file(source.total_frames_num, frame_pixels)
            indices = super().compute_frames_index_to_sample(source, *args, **kwargs)
            limits.check_frames(len(indices), frame_pixels)
            return indices

    return Limited()
