"""Errors name an unreadable file's format, and the readable formats."""

import struct

import pytest
from PIL import Image

from tests.server.test_media import JPEG, data_url, encoded, load
from vitcop_server.errors import RequestError
from vitcop_server.formats import common_formats

UNREADABLE = {
    "the image is empty": b"",
    "is HEIC,": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "is HEIC, which": b"\0\0\0\x1cftypmif1\0\0\0\0mif1heixmiaf",
    "is JPEG XL,": b"\xff\x0a\xfa\x1f",
    "is SVG,": b"<svg/>",
    "is SVG, which": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="5"/>',
    "is HTML,": b"\n<!DOCTYPE html><html><svg/></html>",
    "is PDF,": b"%PDF-1.4\n",
    "is EPS,": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "is MPEG,": b"\0\0\x01\xb3\x16\0\xf0\x15",
    "is MP4 or QuickTime video,": b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2",
    "is WebM or Matroska video,": b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1f",
    "is AVI video,": b"RIFF\x24\0\0\0AVI LIST",
    "starts like PNG,": b"\x89PNG\r\n\x1a\n",
    "starts like JPEG,": JPEG[:20],
    "starts like TIFF,": b"II*\0" + struct.pack("<I", 8) + b"\0\0",
    "format is unknown": b"no image",
    "format is unknown;": b"\0",
}


@pytest.mark.parametrize("words", UNREADABLE)
def test_the_error_names_the_file_s_format(words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        load(data_url(UNREADABLE[words]))
    message = str(refused.value)
    assert "BytesIO" not in message
    assert len(message) < 300
    assert ("include AVIF, BMP, " in message) is (UNREADABLE[words] != b"")


def test_the_listed_formats_can_be_read() -> None:
    assert {"PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"} <= set(common_formats())
    assert not {"EPS", "WMF", "MPEG", "PDF"} & set(common_formats())
    for name in set(common_formats()) & Image.SAVE.keys() - {"ICNS"}:
        image = Image.new("1" if name == "XBM" else "RGB", (16, 16))
        assert load(data_url(encoded(image, name))).media.mode == "RGB"


def test_a_damaged_image_is_refused() -> None:
    png = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(RequestError, match=r"cannot be loaded: image file is truncated"):
        load(data_url(png[: len(png) // 2]))
