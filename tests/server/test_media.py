"""Images that the media connector loads, and images that it refuses before decoding."""

import asyncio
import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image, ImageFile
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from tests.server.sample_videos import video_file, video_url
from vitcop_server.errors import RequestError
from vitcop_server.media import (
    CONNECTOR_NAME,
    BoundedConnection,
    GuardedConnector,
    guard_media,
)
from vitcop_server.settings import ServerSettings
from vitcop_server.size_limits import ImageLimits
from vitcop_server.video import VideoLimits

LIMITS = ImageLimits(max_pixels=10_000, max_aspect_ratio=4.0)
VIDEO_LIMITS = VideoLimits(LIMITS, max_frames=50, max_pixels=40_000)


@pytest.fixture(autouse=True)
def limits_of_pillow(media_of_the_process: None) -> None:
    LIMITS.configure_pillow()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG with any size in its header and few bytes of data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, part) for name, part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


def icon(png: bytes) -> bytes:
    """An icon file that declares its image to be 16 x 16 pixels."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def load(url: str, connection: Any = None, **options: Any) -> Any:
    connector = GuardedConnector(
        limits=VIDEO_LIMITS, connection=connection or BoundedConnection(), **options
    )
    return asyncio.run(connector.fetch_image_async(url))


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (1, 1))),
        encoded(Image.new("RGB", (100, 100))),
        encoded(Image.new("RGB", (80, 20))),
        encoded(Image.new("CMYK", (8, 8)), "JPEG"),
        encoded(Image.new("I;16", (8, 8))),
        encoded(Image.new("LA", (8, 8))),
        encoded(Image.new("RGBA", (8, 8)), "WEBP"),
        encoded(Image.new("P", (8, 8)), "GIF"),
        encoded(Image.new("1", (8, 8)), "TIFF"),
        encoded(Image.new("RGB", (8, 8)), "BMP"),
        icon(encoded(Image.new("RGBA", (16, 16)))),
    ],
)
def test_images_of_every_format_are_loaded(data: bytes) -> None:
    assert load(data_url(data)).media.mode == "RGB"


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load(data_url(gif)).media.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (huge_png(101, 100), "server.max_image_pixels is 10000"),
        (huge_png(30_000, 30_000), "server.max_image_pixels is 10000"),
        (huge_png(81, 20), "is 4"),
        (huge_png(1, 5), "is 4"),
        (icon(encoded(Image.new("RGBA", (200, 200)))), "server.max_image_pixels is 10000"),
        (icon(encoded(Image.new("RGBA", (90, 10)))), "is 4"),
    ],
)
def test_too_large_and_too_thin_images_are_refused(data: bytes, limit: str) -> None:
    with pytest.raises(RequestError, match=limit) as refused:
        load(data_url(data))
    assert refused.value.parameter == "image_url"


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(Image.new("1", (12_000, 12_000)))
    monkeypatch.delattr(ImageFile.ImageFile, "load")  # Pillow's decoder
    with pytest.raises(RequestError, match=r"server\.max_image_pixels"):
        load(data_url(whole))


JPEG = encoded(Image.new("RGB", (64, 64)), "JPEG")


@pytest.mark.parametrize(
    "url",
    [
        data_url(JPEG[: len(JPEG) // 2]),
        data_url(huge_png(100, 100)),
        data_url(JPEG)[:-3],
        data_url(b""),
        data_url(b"no image"),
        data_url(b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>'),
        data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
        data_url(b"%PDF-1.4\n"),
        "data:image/png;base64,@@@@",
        "data:image/png;base64,٣",
        "data:image/png,abc",
        "data:image/png",
        "ftp://127.0.0.1/a.png",
        "file:///etc/hostname",
        "no url",
        "http://[::1",
        "http://127.0.0.1:9/a.png",
        "HTTP://127.0.0.1:9/a.png",
        "http://169.254.169.254/latest/meta-data/",
    ],
    ids=lambda url: url[:40],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(RequestError) as refused:
        load(url)
    assert len(str(refused.value)) < 300


class Failing(HTTPConnection):
    """A connection that always fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def async_get_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        raise self.error


def response_error(status: int) -> aiohttp.ClientResponseError:
    request: Any = None
    return aiohttp.ClientResponseError(request, (), status=status)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (response_error(404), "404"),
        (response_error(429), "429"),
        (response_error(503), "503"),
        (TimeoutError(), "TimeoutError"),
        (ConnectionResetError(), "ConnectionResetError"),
        (aiohttp.ServerDisconnectedError(), "ServerDisconnectedError"),
        (OSError(-2, "Name or service not known"), "OSError"),
        (aiohttp.InvalidURL("x"), "Invalid URL"),
    ],
)
def test_a_failed_fetch_is_a_422(error: Exception, message: str) -> None:
    url = "http://here.example/" + "a" * 5000
    with pytest.raises(VLLMUnprocessableEntityError, match=message) as refused:
        load(url, Failing(error), allowed_media_domains=["here.example"])
    assert len(str(refused.value)) < 300


def test_other_hosts_are_refused() -> None:
    with pytest.raises(RequestError, match=r"allowed domains.*there\.example"):
        load(
            "http://there.example/a.png", Failing(OSError()), allowed_media_domains=["here.example"]
        )


def test_a_silent_server_is_a_timeout() -> None:
    class Silent(HTTPConnection):
        async def get_async_response(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(30)

    class BoundedSilent(BoundedConnection, Silent):
        pass

    with pytest.raises(TimeoutError):
        asyncio.run(BoundedSilent().async_get_bytes("http://127.0.0.1/", timeout=0.2))


def test_only_files_in_the_allowed_folder_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    options = {"allowed_local_media_path": str(tmp_path)}
    assert load(f"file://{tmp_path}/a.png", **options).media.size == (8, 8)
    for path in (f"{tmp_path}/../b.png", f"{tmp_path}/none.png", "/etc/hostname", str(tmp_path)):
        with pytest.raises((RequestError, VLLMUnprocessableEntityError)):
            load(f"file://{path}", **options)


def test_vllm_finds_the_connector_and_keeps_the_operator_s_choice() -> None:
    environ = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1"}
    guard_media(ServerSettings(max_image_pixels=50, max_body_bytes=3 * 2**20), environ)
    assert environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "1"
    assert environ["VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"] == "3"
    assert environ["VLLM_MEDIA_CONNECTOR"] == CONNECTOR_NAME
    connector = MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR_NAME, media_io_kwargs=None)
    with pytest.raises(RequestError, match="is 50"):
        connector.fetch_image(data_url(huge_png(9, 9)))


# Videos.


def load_video(url: str) -> Any:
    connector = GuardedConnector(limits=VIDEO_LIMITS, connection=BoundedConnection())
    frames, metadata = asyncio.run(connector.fetch_video_async(url)).media
    return frames, metadata


@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_a_video_is_read_by_vllm_s_loader(kind: str) -> None:
    frames, metadata = load_video(video_url(video_file(8, (48, 32), kind=kind)))
    assert frames.shape == (8, 32, 48, 3)
    assert metadata["frames_indices"] == [*range(8)]


def test_frames_may_be_sent_as_jpeg_images() -> None:
    jpeg = encoded(Image.new("RGB", (48, 32)), "JPEG")
    text = ",".join([base64.b64encode(jpeg).decode()] * 3)
    frames, _ = load_video(f"data:video/jpeg;base64,{text}")
    assert frames.shape == (3, 32, 48, 3)
    large = base64.b64encode(encoded(Image.new("RGB", (101, 100)), "JPEG")).decode()
    with pytest.raises(RequestError, match="max_image_pixels"):
        load_video(f"data:video/jpeg;base64,{large},{large}")


VIDEO = video_file(8, (48, 32))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the video is empty"),
        (b"no video", "the video cannot be read"),
        (VIDEO[:100], "the video cannot be read"),
        (video_file(8, (120, 100)), "the video has 120 x 100 = 12000 pixels"),
        (video_file(8, (160, 32)), "server.max_aspect_ratio"),
        (video_file(51, (16, 16)), "51 frames, but server.max_video_frames is 50"),
        (video_file(30, (48, 32)), "30 frames of 1536 pixels, of which 30 would be read"),
    ],
)
def test_a_video_above_a_limit_or_without_frames_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_video(video_url(data))
    assert words in str(refused.value)
    assert refused.value.param == "video_url"


def test_errors_of_a_video_s_url_speak_of_the_video() -> None:
    for url, words in (
        ("data:video/mp4,AAAA", "must start like 'data:video/mp4;base64,'"),
        ("data:video/mp4;base64,A-A", "the video's base64 data contain '-'"),
        ("http://example.com/a.mp4", "images and videos are not fetched"),
    ):
        with pytest.raises(RequestError) as refused:
            load_video(url)
        assert words in str(refused.value)


def test_a_file_may_have_more_frames_than_are_read() -> None:
    """The default loader reads 32 of them."""
    frames, metadata = load_video(video_url(video_file(48, (32, 32))))
    assert len(frames) == 32
    assert metadata["total_num_frames"] == 48
