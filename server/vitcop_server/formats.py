"""Describes a file that cannot be read as an image, and lists the formats that can."""

import re
from functools import cache

from PIL import Image
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS

_SIGNATURES = {
    "HEIC": rb".{4}ftyp.{0,56}(hei[cxms]|hev[cxms])",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "HTML": rb"(\xef\xbb\xbf)?\s*<(html|!doctype html)",
    "SVG": rb"(\xef\xbb\xbf)?\s*<(svg|[?!].*<svg)",
    "PDF": rb"%PDF-",
    "MP4 or QuickTime video": rb".{4}ftyp(?!avi[fs]|mif1|msf1)",
    "WebM or Matroska video": rb"\x1aE\xdf\xa3",
    "AVI video": rb"RIFF.{4}AVI ",
}
"""Formats that clients send and Pillow does not know, with a pattern of their first bytes."""


def describe_unreadable(data: bytes) -> str:
    """The error message for a file that Pillow cannot open."""
    if not data:
        return "the image is empty"
    name = _format_name(data)
    if name is None:
        problem = "the image's format is unknown"
    elif name in ALLOWED_IMAGE_FORMATS:
        problem = f"the image starts like {name}, but is damaged or cannot be read"
    else:
        problem = f"the image is {name}, which cannot be read"
    return f"{problem}; formats that can be read include {', '.join(common_formats())}"


@cache
def common_formats() -> tuple[str, ...]:
    """Formats that vLLM reads, without rare ones, which have no media type in Pillow."""
    Image.init()
    return tuple(name for name in ALLOWED_IMAGE_FORMATS if name in Image.OPEN.keys() & Image.MIME)


def _format_name(data: bytes) -> str | None:
    start = data[:512]
    for name, pattern in _SIGNATURES.items():
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return name
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        # As in Image.open: a string is the reason why a plugin cannot read the file.
        if accepts is not None and accepts(start[:16].ljust(16, b"\0")) is True:
            return name
    return None
