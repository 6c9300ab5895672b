"""Reads the videos of requests, with limits that are checked before frames are decoded."""

from dataclasses import dataclass
from typing import Any, Self

from cv2 import CAP_PROP_FRAME_HEIGHT, CAP_PROP_FRAME_WIDTH
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders import VideoSourceMetadata

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

    def check_frames(self, num_frames: int) -> None:
        """Refuse a file with too many frames.

        Raises:
            RequestError: The message has the limit's name and value.
        """
        if num_frames > self.max_frames:
            raise RequestError(
                f"the video has {num_frames} frames, but server.max_video_frames is "
                f"{self.max_frames}: send a shorter video, or one with fewer frames per second",
                param=PARAM,
            )

    def check_pixels(self, frame_pixels: int, num_frames: int, num_read: int) -> None:
        """Refuse frames that take too much memory or time.

        Args:
            frame_pixels: Width times height.
            num_frames: Frames of the file.
            num_read: Frames of it that are read.

        Raises:
            RequestError: The message has the limit's name and value.
        """
        for frames, factor in ((num_read, 1), (num_frames, _FILE_SHARE)):
            if frames * frame_pixels > factor * self.max_pixels:
                raise RequestError(
                    f"the video has {num_frames} frames of {frame_pixels} pixels, of which "
                    f"{num_read} would be read, but server.max_video_pixels is "
                    f"{self.max_pixels} for frames that are read, and {_FILE_SHARE} times as "
                    "many for the file: send a shorter or smaller video",
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
        self.video_loader = _limited(self.video_loader, self._limits)
        try:
            loaded = super().load_bytes(data)
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(
                f"the video cannot be read: it is cut off, or its format is unknown ({error})",
                param=PARAM,
            ) from error
        frames, _ = loaded.media
        if not len(frames):
            raise RequestError("no frame of the video can be read", param=PARAM)
        return loaded


def _limited(loader: Any, limits: VideoLimits) -> Any:
    """A copy of vLLM's loader that checks a video before it decodes frames."""

    class Limited(type(loader)):  # type: ignore[misc]
        @classmethod
        def compute_frames_index_to_sample(
            cls, source: VideoSourceMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            # Every decoder calls this.
            if source.total_frames_num < 1:
                raise RequestError("the video has no frame that can be read", param=PARAM)
            limits.check_frames(source.total_frames_num)
            return super().compute_frames_index_to_sample(source, *args, **kwargs)

        @classmethod
        def read_frames(
            cls, cap: Any, frame_idx: list[int], total_frames_num: int, **kwargs: Any
        ) -> Any:
            # The default decoder, OpenCV, calls this when it knows the frames' size.
            width, height = (
                int(cap.get(side)) for side in (CAP_PROP_FRAME_WIDTH, CAP_PROP_FRAME_HEIGHT)
            )
            if width < 1 or height < 1:
                raise RequestError("the video has no frame that can be read", param=PARAM)
            limits.frame.check(width, height, "video")
            limits.check_pixels(width * height, total_frames_num, len(frame_idx))
            return super().read_frames(cap, frame_idx, total_frames_num, **kwargs)

    return Limited()
