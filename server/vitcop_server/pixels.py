"""Converts decoded images to modes that Pillow's ``convert`` turns into correct RGB.

vLLM calls ``image.convert("RGB")``, which clips samples above 255, refuses La, drops the alpha of
RGBa, and compares a PNG's transparent colour with samples of another depth.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from vitcop_server.errors import RequestError

_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}
_KEY_SCALES = {"L;2": 85, "L;4": 17}
"""Raw modes of grey PNGs whose samples Pillow scales to 8 bits, but not the transparent grey."""


def to_eight_bits(image: Image.Image, file: ImageFile) -> Image.Image:
    """Convert an image to 8 bits per channel, with its transparency in an alpha channel.

    Args:
        image: The decoded image. Modes that vLLM converts correctly are returned unchanged.
        file: The file of ``image`` as ``Image.open`` returned it, not decoded.

    Raises:
        RequestError: If the file does not define which sample value is white, or if Pillow has
            lost the bits that mark transparent pixels.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_eight_bits(image, file)
    if image.mode in _STRAIGHT_ALPHA:
        return image.convert(_STRAIGHT_ALPHA[image.mode])
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return _key_to_alpha(image, file)
    return image


def _deep_grey_to_eight_bits(image: Image.Image, file: ImageFile) -> Image.Image:
    wide = image if image.mode == "F" else image.convert("I")
    white = _white_level(image.mode, file)
    if white is None:
        _check_values(wide, file)
        grey = wide.convert("L")
    else:
        grey = wide.point(_scale_table(white), "L")
    if isinstance(file, TiffImageFile) and file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        grey = ImageOps.invert(grey)  # Pillow inverts "white is zero" at 8 bits only.
    key: int | None = grey.info.pop("transparency", None)
    if key is not None:
        grey.putalpha(wide.point([255] * key + [0] + [255] * (65535 - key), "L"))
    return grey


def _white_level(mode: str, file: ImageFile) -> int | None:
    """Sample value that the file format defines as white, or None if it defines none."""
    if mode != "F" and file.format in ("PNG", "PPM", "JPEG2000"):
        return 65535  # Pillow scales samples of 9 to 15 bits to 16 bits.
    if mode.startswith("I;16") and isinstance(file, TiffImageFile):
        bits: int = file.tag_v2[BITSPERSAMPLE][0]  # Pillow does not scale samples of TIFF files.
        return 2**bits - 1
    return None


def _check_values(image: Image.Image, file: ImageFile) -> None:
    """Refuse values outside 0 to 255, and values from 0 to 1, which may mean black to white."""
    values = np.asarray(image)
    low, high = values.min(), values.max()  # NaN if any value is NaN.
    if not (low >= 0 and 1 < high <= 255):
        raise RequestError(
            f"the image's values range from {low:g} to {high:g}, and its {file.format} file does "
            "not define which value is white: send 8 or 16 bits per channel, or scale the values "
            "to the range from 0 to 255",
            param="image_url",
        )


@cache
def _scale_table(white: int) -> list[int]:
    """The 8-bit value of each 16-bit sample."""
    return [min(255, round(sample * 255 / white)) for sample in range(2**16)]


def _key_to_alpha(image: Image.Image, file: ImageFile) -> Image.Image:
    """Turn the file's transparent colour into an alpha channel; vLLM ignores it in RGB."""
    raw_mode = file.tile[0].args if file.format == "PNG" else None
    if raw_mode == "RGB;16B":
        raise RequestError(
            "the image is a PNG with 16 bits per channel and a transparent colour, which cannot "
            "be read: send 8 bits per channel, or an alpha channel",
            param="image_url",
        )
    if raw_mode in _KEY_SCALES:
        image.info["transparency"] *= _KEY_SCALES[raw_mode]
    return image.convert("RGBA")
