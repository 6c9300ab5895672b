"""Pictures from strangers: nothing is fetched unasked, nothing huge is decoded.

vLLM makes its media connector anew for each request, by a name looked up in a registry; ours
stands there under its own name, with its limits bound to it.
"""

import asyncio
import math
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, Self

import aiohttp
from PIL import Image
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
)

from server.errors import RequestError
from server.settings import ServerSettings

CONNECTOR_NAME = "vitcop"

_PARAM = "image_url"


def guard_media(settings: ServerSettings, environ: MutableMapping[str, str]) -> None:
    """Have vLLM load media through :class:`GuardedConnector`; what the operator set stands.

    Args:
        settings: The operator's limits.
        environ: The process's environment, where vLLM looks for each request.
    """
    for name, value in {
        "VLLM_MEDIA_CONNECTOR": CONNECTOR_NAME,
        # An allowed domain must not send us to one that is not.
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # The client has an answer within five seconds, after one more try a second later.
        "VLLM_IMAGE_FETCH_TIMEOUT": "4",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "2",
        # Fetched or sent along: a picture may have as many bytes.
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(math.ceil(settings.max_body_bytes / 2**20)),
    }.items():
        environ.setdefault(name, value)
    limits = PictureLimits.from_settings(settings)
    limits.tell_pillow()
    # One connection pool for all requests.
    connector = partial(GuardedConnector, limits=limits, connection=BoundedConnection())
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR_NAME)(connector)


class UnreachableMediaError(VLLMUnprocessableEntityError):
    """The fault of a server that the client named: vLLM answers 422, in OpenAI's shape."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class PictureLimits:
    """Sizes that are refused before a picture is decoded.

    Attributes:
        max_pixels: Most pixels, width times height.
        max_aspect_ratio: Longest side over shortest.
    """

    max_pixels: int
    max_aspect_ratio: float

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> Self:
        return cls(settings.max_picture_pixels, settings.max_aspect_ratio)

    def check(self, width: int, height: int) -> None:
        """Refuse a picture of a size.

        Raises:
            RequestError: With the limit's name and value.
        """
        if width * height > self.max_pixels:
            raise RequestError(
                f"the picture has {width} x {height} = {width * height} pixels, and "
                f"server.max_picture_pixels is {self.max_pixels}",
                param=_PARAM,
            )
        longest, shortest = max(width, height), min(width, height)
        if longest > self.max_aspect_ratio * shortest:
            raise RequestError(
                f"the picture's sides are {width} and {height}, and server.max_aspect_ratio, "
                f"the longest over the shortest, is {self.max_aspect_ratio:g}",
                param=_PARAM,
            )

    def tell_pillow(self) -> None:
        """Have Pillow refuse such pictures too where they hide inside others, as in icons."""
        Image.MAX_IMAGE_PIXELS = math.ceil(self.max_pixels / 2)  # It refuses twice as many,
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # and warns before.


class GuardedConnector(MediaConnector):
    """vLLM's connector with our limits, whose every failure is an answer to the client."""

    def __init__(self, *args: Any, limits: PictureLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits

    def load_from_url(self, url: str, media_io: MediaIO, **kwargs: Any) -> Any:
        with _failures_told():
            return super().load_from_url(url, self._guarded(media_io), **kwargs)

    async def load_from_url_async(self, url: str, media_io: MediaIO, **kwargs: Any) -> Any:
        with _failures_told():
            return await super().load_from_url_async(url, self._guarded(media_io), **kwargs)

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        if not self.allowed_media_domains:
            raise RequestError(
                "pictures are not fetched from elsewhere: send them as data URLs (the operator "
                "may allow hosts with --allowed-media-domains)",
                param=_PARAM,
            )
        super()._assert_url_in_allowed_media_domains(url_spec)

    def _guarded(self, media_io: MediaIO) -> MediaIO:
        if not isinstance(media_io, ImageMediaIO):
            return media_io
        return GuardedImageIO(self._limits, image_mode=media_io.image_mode, **media_io.kwargs)


class GuardedImageIO(ImageMediaIO):
    """vLLM's reader of pictures, which first looks at the size in a file's header."""

    def __init__(self, limits: PictureLimits, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._limits = limits

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        try:
            with open_image(BytesIO(data)) as header:
                self._limits.check(*header.size)
            loaded = super().load_bytes(data)
            self._limits.check(*loaded.media.size)  # A container's header may lie.
        except Image.DecompressionBombError as error:
            raise RequestError(
                f"the picture has too many pixels: server.max_picture_pixels is "
                f"{self._limits.max_pixels}",
                param=_PARAM,
            ) from error
        except OSError as error:  # Pillow's, for files that are no pictures.
            raise RequestError(f"the picture cannot be read: {error}", param=_PARAM) from error
        return loaded


class BoundedConnection(HTTPConnection):
    """vLLM's HTTP client, whose timeout is for all tries together; vLLM's grows with each."""

    async def async_get_bytes(self, *args: Any, timeout: float, **kwargs: Any) -> bytes:
        async with asyncio.timeout(timeout):
            # With a timeout of its own, aiohttp would take the cancellation for that.
            fetched: bytes = await super().async_get_bytes(*args, timeout=None, **kwargs)
            return fetched


@contextmanager
def _failures_told() -> Iterator[None]:
    """Every failure to load media as an error of the client's; our own pass."""
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except VLLMUnprocessableEntityError as error:  # Without the URL, of any length.
        raise UnreachableMediaError(str(error.args[0]), parameter=_PARAM) from error
    except aiohttp.ClientResponseError as error:
        raise UnreachableMediaError(
            f"the picture's server answered with status {error.status}", parameter=_PARAM
        ) from error
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one.
        raise UnreachableMediaError(
            f"the picture cannot be fetched ({type(error).__name__})", parameter=_PARAM
        ) from error
    except Exception as error:  # Decoders raise whatever they like.
        raise RequestError(f"the picture cannot be loaded: {error}", param=_PARAM) from error
