"""Loads images and videos of requests: fetches from allowed hosts only, checks size limits.

vLLM creates a media connector for each request, from a class that it finds by name in a registry.
:func:`guard_media` registers ours with its limits.
"""

import asyncio
import math
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any, Self

import aiohttp
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaIO,
    MediaWithBytes,
    VideoMediaIO,
)

from vitcop_server.data_urls import EXAMPLES, decode_base64, split_data_url
from vitcop_server.errors import RequestError
from vitcop_server.formats import describe_unreadable
from vitcop_server.pixels import to_eight_bits
from vitcop_server.settings import ServerSettings
from vitcop_server.size_limits import ImageLimits
from vitcop_server.video import GuardedVideoIO, VideoLimits
from vitcop_vllm.adoption import adopt_copy

CONNECTOR_NAME = "vitcop"

_PARAM = "image_url"
_MAX_URL_LENGTH = 65536
"""Maximum length, in characters, of a URL that is not a data URL.

Parsing blocks the event loop for 0.1 s per million characters.
"""


def guard_media(settings: ServerSettings, environ: MutableMapping[str, str]) -> None:
    """Make vLLM load media through :class:`GuardedConnector`; the operator's variables win.

    Args:
        settings: The operator's limits.
        environ: The process's environment; vLLM reads it for each request.
    """
    for name, value in {
        "VLLM_MEDIA_CONNECTOR": CONNECTOR_NAME,
        # An allowed host must not redirect to another one.
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # One retry after a second; the client has an answer within five seconds.
        "VLLM_IMAGE_FETCH_TIMEOUT": "4",
        "VLLM_VIDEO_FETCH_TIMEOUT": "4",
        "VLLM_MEDIA_FETCH_MAX_RETRIES": "2",
        # Fetched images have the same limit as images in a body.
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(math.ceil(settings.max_body_bytes / 2**20)),
    }.items():
        environ.setdefault(name, value)
    limits = VideoLimits.from_settings(settings)
    limits.frame.configure_pillow()
    # One connection pool for all requests.
    connector = partial(GuardedConnector, limits=limits, connection=BoundedConnection())
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR_NAME)(connector)


class UnreachableMediaError(VLLMUnprocessableEntityError):
    """The image's server failed; vLLM answers with status 422, in OpenAI's format."""

    def __str__(self) -> str:
        return str(self.args[0])


class GuardedConnector(MediaConnector):
    """vLLM's connector with our limits. Every failure becomes a client error (400 or 422)."""

    def __init__(self, *args: Any, limits: VideoLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits

    def load_from_url(self, url: str, media_io: MediaIO, **kwargs: Any) -> Any:
        with _client_errors(what := _what(media_io)):
            return super().load_from_url(_trim_url(url, what), self._guarded(media_io), **kwargs)

    async def load_from_url_async(self, url: str, media_io: MediaIO, **kwargs: Any) -> Any:
        with _client_errors(what := _what(media_io)):
            url = _trim_url(url, what)
            return await super().load_from_url_async(url, self._guarded(media_io), **kwargs)

    def _load_data_url(self, url: str, media_io: MediaIO) -> Any:
        # vLLM's own method refuses white space and upper case.
        return media_io.load_base64(*split_data_url(url, _what(media_io)))

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:
        if not self.allowed_media_domains:
            raise RequestError(
                "images and videos are not fetched from other hosts: send them as data URLs (the "
                "operator may allow hosts with --allowed-media-domains)",
                param=_PARAM,
            )
        super()._assert_url_in_allowed_media_domains(url_spec)

    def _guarded(self, media_io: MediaIO) -> MediaIO:
        if isinstance(media_io, VideoMediaIO):
            frames = GuardedImageIO.adopt(media_io.image_io, self._limits.frame)
            return GuardedVideoIO.adopt(media_io, self._limits, frames)
        if isinstance(media_io, ImageMediaIO):
            return GuardedImageIO.adopt(media_io, self._limits.frame)
        return media_io


class GuardedImageIO(ImageMediaIO):
    """vLLM's image reader, with size limits and correct colours. Use one instance per image."""

    _file: ImageFile
    _limits: ImageLimits

    @classmethod
    def adopt(cls, media_io: ImageMediaIO, limits: ImageLimits) -> Self:
        """A copy of ``media_io`` with limits; it keeps other attributes, such as budgets."""
        guarded: Self = adopt_copy(media_io, cls)
        guarded._limits = limits
        return guarded

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Image.Image]:
        return self.load_bytes(decode_base64(data))

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        try:
            with open_image(BytesIO(data)) as file:
                self._limits.check(*file.size)
                self._file = file
            loaded = super().load_bytes(data)
            self._limits.check(*loaded.media.size)  # A container's header may state another size.
        except Image.DecompressionBombError as error:
            raise RequestError(
                f"the image has too many pixels: server.max_image_pixels is "
                f"{self._limits.max_pixels}",
                param=_PARAM,
            ) from error
        except UnidentifiedImageError as error:
            raise RequestError(describe_unreadable(data), param=_PARAM) from error
        except OSError as error:  # The header is cut off.
            raise RequestError(f"the image cannot be read: {error}", param=_PARAM) from error
        return loaded

    def _convert_image_mode(self, image: Image.Image | MediaWithBytes[Image.Image]) -> Image.Image:
        # load_bytes passes a decoded copy without the file's format and tags.
        assert isinstance(image, Image.Image)
        return super()._convert_image_mode(to_eight_bits(image, self._file))


class BoundedConnection(HTTPConnection):
    """vLLM's HTTP client with one timeout for all tries; vLLM's timeout grows with each try."""

    async def async_get_bytes(self, *args: Any, timeout: float, **kwargs: Any) -> bytes:
        async with asyncio.timeout(timeout):
            # With its own timeout, aiohttp would report this cancellation as that timeout.
            fetched: bytes = await super().async_get_bytes(*args, timeout=None, **kwargs)
            return fetched


def _what(media_io: MediaIO) -> str:
    """What a reader reads, for error messages."""
    return "video" if isinstance(media_io, VideoMediaIO) else "image"


def _trim_url(url: str, what: str) -> str:
    """Remove white space around a URL, as browsers do, and refuse a URL that is too long."""
    url = url.strip()
    if len(url) > _MAX_URL_LENGTH and url[:5].lower() != "data:":
        raise RequestError(
            f"the {what}'s URL must have at most {_MAX_URL_LENGTH} characters, not {len(url)}: "
            f"send {what} data as a data URL, which starts like 'data:{EXAMPLES[what]};base64,'",
            param=f"{what}_url",
        )
    return url


@contextmanager
def _client_errors(what: str) -> Iterator[None]:
    """Turn every failure to load media into a client error; a RequestError passes unchanged."""
    param = f"{what}_url"
    try:
        yield
    except (RequestError, MemoryError):
        raise
    except VLLMUnprocessableEntityError as error:  # Omit the URL: it may be long.
        raise UnreachableMediaError(str(error.args[0]), parameter=param) from error
    except aiohttp.ClientResponseError as error:
        raise UnreachableMediaError(
            f"the {what}'s server answered with status {error.status}", parameter=param
        ) from error
    except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one.
        raise UnreachableMediaError(
            f"the {what} cannot be fetched ({type(error).__name__})", parameter=param
        ) from error
    except Exception as error:  # Decoders raise any class.
        raise RequestError(
            f"the {what} cannot be loaded: {error.__cause__ or error}", param=param
        ) from error
