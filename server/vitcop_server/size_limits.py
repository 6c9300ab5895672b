"""Limits of the size of images and of the frames of videos."""

import math
import warnings
from dataclasses import dataclass
from typing import Self

from PIL import Image

from vitcop_server.errors import RequestError
from vitcop_server.settings import ServerSettings


@dataclass(frozen=True)
class ImageLimits:
    """Limits of an image's size, checked before the image is decoded.

    Attributes:
        max_pixels: Maximum of width times height.
        max_aspect_ratio: Maximum of longest side over shortest side.
    """

    max_pixels: int
    max_aspect_ratio: float

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Self:
        return cls(settings.max_image_pixels, settings.max_aspect_ratio)

    def check(self, width: int, height: int, what: str = "image") -> None:
        """Refuse a size in pixels above a limit.

        Args:
            width, height: Size of an image, or of a video's frames.
            what: ``image`` or ``video``.

        Raises:
            RequestError: The message has the limit's name and value.
        """
        param = f"{what}_url"
        if width * height > self.max_pixels:
            raise RequestError(
                f"the {what} has {width} x {height} = {width * height} pixels, but "
                f"server.max_image_pixels is {self.max_pixels}: send a smaller {what}",
                param=param,
            )
        longest, shortest = max(width, height), min(width, height)
        if longest > self.max_aspect_ratio * shortest:
            raise RequestError(
                f"the {what} has {width} x {height} pixels, but server.max_aspect_ratio, the "
                f"longest side over the shortest, is {self.max_aspect_ratio:g}: crop or pad it",
                param=param,
            )

    def configure_pillow(self) -> None:
        """Set the pixel limit in Pillow, for images inside other files, such as icons."""
        # Pillow warns above its limit, and refuses an image above twice its limit.
        Image.MAX_IMAGE_PIXELS = math.ceil(self.max_pixels / 2)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
