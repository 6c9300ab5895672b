"""Every mode and layout of samples becomes the RGB of a browser, or is refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.image import convert_image_mode

from tests.server.test_media import data_url, encoded, load
from vitcop_server.errors import RequestError
from vitcop_server.pixels import to_eight_bits

SIDE = 16
X, Y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
GREY = (16 * Y + X).astype(np.uint8)
RGB = np.stack([17 * X, 17 * Y, 255 - 17 * X], axis=-1).astype(np.uint8)
ALPHA = (17 * Y).astype(np.uint8)
TRIPLES = GREY[..., None].repeat(3, axis=-1)
WHITE = np.full(3, 255.0)


def shown(colours: Any, alpha: Any, background: Any = WHITE) -> Any:
    """``colours`` [..., 3] over a background."""
    share = np.asarray(alpha)[..., None] / 255
    return colours * share + background * (1 - share)


def palette_image(mode: str = "P") -> Image.Image:
    image = Image.fromarray(GREY).convert("P")
    image.putpalette(RGB.tobytes())
    if mode == "PA":
        image.putalpha(Image.fromarray(ALPHA))
    return image


def deep(mode: str) -> Image.Image:
    samples = (GREY.astype(np.uint32) * 257).astype(">u2" if mode == "I;16B" else "<u2")
    return Image.frombytes(mode, (SIDE, SIDE), samples.tobytes())


GREY_IMAGE = Image.fromarray(GREY)
RGB_IMAGE = Image.fromarray(RGB)
RGBA_IMAGE = Image.fromarray(np.dstack([RGB, ALPHA]))
LA_IMAGE = Image.fromarray(np.dstack([GREY, ALPHA]))

SAMPLES = {
    "1": (GREY_IMAGE.point(lambda value: 255 * (value > 99), "1"), 255 * (TRIPLES > 99)),
    "L": (GREY_IMAGE, TRIPLES),
    "LA": (LA_IMAGE, shown(TRIPLES, ALPHA)),
    "La": (LA_IMAGE.convert("La"), shown(TRIPLES, ALPHA)),
    "P": (palette_image(), RGB),
    "PA": (palette_image("PA"), shown(RGB, ALPHA)),
    "RGB": (RGB_IMAGE, RGB),
    "RGBA": (RGBA_IMAGE, shown(RGB, ALPHA)),
    "RGBa": (RGBA_IMAGE.convert("RGBa"), shown(RGB, ALPHA)),
    "RGBX": (RGB_IMAGE.convert("RGBX"), RGB),
    "CMYK": (RGB_IMAGE.convert("CMYK"), RGB),
    "YCbCr": (RGB_IMAGE.convert("YCbCr"), RGB),
    "HSV": (RGB_IMAGE.convert("HSV"), RGB),
    "LAB": (Image.new("RGB", (SIDE, SIDE), (200, 100, 50)).convert("LAB"), (200, 100, 50)),
    "I;16": (deep("I;16"), TRIPLES),
    "I;16L": (deep("I;16L"), TRIPLES),
    "I;16N": (deep("I;16N"), TRIPLES),
    "I;16B": (deep("I;16B"), TRIPLES),
    "I": (Image.fromarray(GREY.astype(np.int32)), TRIPLES),
    "F": (Image.fromarray(GREY.astype(np.float32)), TRIPLES),
}
"""An image of each mode, and the RGB that a browser shows."""

ROUNDING = {"YCbCr": 3, "HSV": 6, "La": 9, "RGBa": 9}
"""Rounding error of a mode's 8-bit samples, if above 1."""

FILES = {
    "1": ["PNG", "TIFF", "BMP", "GIF", "PPM"],
    "L": ["PNG", "TIFF", "BMP", "GIF", "PPM", "JPEG", "WEBP", "JPEG2000", "AVIF", "SGI"],
    "LA": ["PNG", "TIFF", "WEBP", "JPEG2000", "TGA"],
    "P": ["PNG", "TIFF", "BMP", "GIF", "TGA"],
    "PA": ["TIFF"],
    "RGB": ["PNG", "TIFF", "BMP", "PPM", "JPEG", "WEBP", "JPEG2000", "AVIF", "SGI", "PCX"],
    "RGBA": ["PNG", "TIFF", "WEBP", "JPEG2000", "AVIF", "ICO", "TGA", "DDS"],
    "RGBX": ["TIFF"],
    "CMYK": ["TIFF", "JPEG", "JPEG2000"],
    "YCbCr": ["TIFF", "JPEG"],
    "LAB": ["TIFF"],
    "I;16": ["PNG", "TIFF", "JPEG2000", "PPM"],
    "I;16B": ["PNG", "TIFF"],
    "I": ["TIFF"],
    "F": ["TIFF", "PPM"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ICO": {"sizes": [(SIDE, SIDE)]},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
LOSS = {"JPEG": 4, "AVIF": 4}


def pixels(data: bytes, **options: Any) -> Any:
    image = load(data_url(data), **options).media
    assert image.mode == "RGB"
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode, kinds in FILES.items() for kind in kinds]
)
def test_files_of_every_mode_become_rgb(mode: str, kind: str) -> None:
    image, expected = SAMPLES[mode]
    data = encoded(image, kind, **OPTIONS.get(kind, {}))
    tolerance = max(ROUNDING.get(mode, 1), LOSS.get(kind, 1))
    assert np.abs(pixels(data) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", [mode for mode in SAMPLES if mode not in ("I", "F")])
def test_images_of_every_mode_become_rgb(mode: str) -> None:
    """Also modes that no Pillow plugin opens a file in today."""
    image, expected = SAMPLES[mode]
    with Image.open(io.BytesIO(encoded(GREY_IMAGE))) as file:
        converted = convert_image_mode(to_eight_bits(image, file), "RGB")
    assert np.abs(np.asarray(converted, np.float64) - expected).max() <= ROUNDING.get(mode, 1)


def test_every_pillow_mode_has_a_sample() -> None:
    assert set(Image.MODES) <= SAMPLES.keys()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, depth: int, colour_type: int, row: str, transparent: str = "") -> bytes:
    """A PNG of one row; samples and transparent colour are hexadecimal."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    key = chunk(b"tRNS", bytes.fromhex(transparent)) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"\0" + bytes.fromhex(row)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + data + chunk(b"IEND", b"")


def tiff(
    width: int, bits: list[int], photometric: int, row: str, extra: int = -1, sample_format: int = 1
) -> bytes:
    """A TIFF of one row; samples are hexadecimal."""
    samples = bytes.fromhex(row)
    tags = {
        256: [width],
        257: [1],
        258: bits,
        259: [1],
        262: [photometric],
        273: [8],
        277: [len(bits)],
        278: [1],
        279: [len(samples)],
        **({338: [extra]} if extra >= 0 else {}),
        339: [sample_format] * len(bits),
    }
    at = 8 + len(samples) + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            more += packed
            packed = struct.pack("<I", at + len(more) - len(packed))
        entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II" + struct.pack("<HI", 42, 8 + len(samples)) + samples + directory + more


GREY_PNG, RGB_PNG, PALETTE_PNG, LA_PNG, RGBA_PNG = 0, 2, 3, 4, 6
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB_TIFF, PREMULTIPLIED = 0, 1, 2, 1

LAYOUTS: dict[str, tuple[bytes, list[Any]]] = {
    "grey 1": (png(4, 1, GREY_PNG, "50"), [0, 255, 0, 255]),
    "grey 1, key": (png(4, 1, GREY_PNG, "50", "0000"), [255, 255, 255, 255]),
    "grey 2": (png(4, 2, GREY_PNG, "1b"), [0, 85, 170, 255]),
    "grey 2, key": (png(4, 2, GREY_PNG, "1b", "0001"), [0, 255, 170, 255]),
    "grey 4": (png(4, 4, GREY_PNG, "02af"), [0, 34, 170, 255]),
    "grey 4, key": (png(4, 4, GREY_PNG, "02af", "0002"), [0, 255, 170, 255]),
    "grey 8, key": (png(4, 8, GREY_PNG, "000203ff", "0002"), [0, 255, 3, 255]),
    "grey 16": (png(4, 16, GREY_PNG, "000012348080ffff"), [0, 18, 128, 255]),
    "grey 16, key": (png(4, 16, GREY_PNG, "000012341235ffff", "1234"), [0, 255, 18, 255]),
    "grey 16, black key": (png(4, 16, GREY_PNG, "000012341235ffff", "0000"), [255, 18, 18, 255]),
    "RGB 8, key": (
        png(2, 8, RGB_PNG, "010203010204", "000100020003"),
        [(255, 255, 255), (1, 2, 4)],
    ),
    "RGB 16": (png(2, 16, RGB_PNG, "000080ff123412341234ffff"), [(0, 128, 18), (18, 18, 255)]),
    "LA 16": (png(2, 16, LA_PNG, "8080ffff00008080"), [128, 127]),
    "RGBA 16": (png(1, 16, RGBA_PNG, "8080000000008080"), [(191, 127, 127)]),
    "TIFF 12": (tiff(4, [12], BLACK_IS_ZERO, "000123808fff"), [0, 18, 128, 255]),
    "TIFF 16": (tiff(4, [16], BLACK_IS_ZERO, "000034128080ffff"), [0, 18, 128, 255]),
    "TIFF 16, white is zero": (
        tiff(4, [16], WHITE_IS_ZERO, "000034128080ffff"),
        [255, 237, 127, 0],
    ),
    "TIFF 8, white is zero": (tiff(2, [8], WHITE_IS_ZERO, "00f0"), [255, 15]),
    "TIFF La": (tiff(2, [8, 8], BLACK_IS_ZERO, "32640000", PREMULTIPLIED), [205, 255]),
    "TIFF RGBa": (
        tiff(2, [8] * 4, RGB_TIFF, "3200006400000000", PREMULTIPLIED),
        [(205, 155, 155), (255, 255, 255)],
    ),
    "TIFF RGB 16": (tiff(1, [16] * 3, RGB_TIFF, "000080803412"), [(0, 128, 18)]),
}
"""Files that Pillow cannot write, and their greys or colours."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_samples_become_rgb(name: str) -> None:
    data, expected = LAYOUTS[name]
    colours = np.array([np.broadcast_to(colour, 3) for colour in expected])
    assert np.abs(pixels(data)[0] - colours).max() <= 1


def test_12_bit_jpeg_2000_becomes_rgb() -> None:
    """Pillow writes only 16 bits; with precision 12 in the header, white is 4095."""
    image = Image.fromarray(GREY.astype(np.uint16) * 16 + 30720)
    data = bytearray(encoded(image, "JPEG2000", no_jp2=True))
    size_marker = data.index(b"\xff\x51")
    assert data[size_marker + 40] == 15
    data[size_marker + 40] = 11
    assert np.abs(pixels(bytes(data)) - TRIPLES).max() <= 1


@pytest.mark.parametrize(
    "values",
    [[0, 1], [0, 0.5], [-1, 200], [0, 256], [0, 65535], [np.nan, 200], [200, np.nan], [0, np.inf]],
)
def test_floats_without_a_known_white_are_refused(values: list[float]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(RequestError, match="which value is white") as refused:
        load(data_url(data))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (encoded(Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF"), "from 0 to 65535"),
        (tiff(1, [16], BLACK_IS_ZERO, "0080", sample_format=2), "from -32768 to -32768"),
        (tiff(2, [32], BLACK_IS_ZERO, "00000000ffffffff"), "from -1 to 0"),
        (png(1, 16, RGB_PNG, "123456789abc", "123456789abc"), "transparent colour"),
    ],
)
def test_samples_that_cannot_be_shown_are_refused(data: bytes, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as refused:
        load(data_url(data))
    assert refused.value.parameter == "image_url"


@pytest.mark.parametrize(
    ("data", "colours", "alpha"),
    [
        (encoded(RGBA_IMAGE), RGB, ALPHA),
        (encoded(LA_IMAGE), TRIPLES, ALPHA),
        (encoded(palette_image(), transparency=ALPHA.tobytes()), RGB, ALPHA),
        (encoded(palette_image(), "GIF", transparency=7), RGB, 255 * (GREY != 7)),
        (encoded(deep("I;16"), transparency=7 * 257), TRIPLES, 255 * (GREY != 7)),
        (encoded(GREY_IMAGE, transparency=7), TRIPLES, 255 * (GREY != 7)),
        (
            encoded(RGB_IMAGE, transparency=(17, 34, 238)),
            RGB,
            255 * (RGB != (17, 34, 238)).any(-1),
        ),
    ],
    ids=["RGBA", "LA", "P", "GIF", "16 bit", "L", "RGB"],
)
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparency_shows_the_configured_background(
    data: bytes, colours: Any, alpha: Any, background: tuple[int, int, int]
) -> None:
    options = {"media_io_kwargs": {"image": {"rgba_background_color": background}}}
    expected = shown(colours, alpha, np.array(background))
    assert np.abs(pixels(data, **options) - expected).max() <= 1


@pytest.mark.parametrize(
    ("image", "mode"),
    [(RGBA_IMAGE, "RGBA"), (LA_IMAGE, "LA"), (palette_image(), "P"), (deep("I;16"), "L")],
)
def test_image_mode_none_keeps_8_bit_modes(image: Image.Image, mode: str) -> None:
    options = {"media_io_kwargs": {"image": {"image_mode": None}}}
    assert load(data_url(encoded(image)), **options).media.mode == mode


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_is_shown(kind: str) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = OPTIONS.get(kind, {})
    data = encoded(red, kind, save_all=True, append_images=[blue, red], duration=100, **options)
    assert np.abs(pixels(data) - (255, 0, 0)).max() <= LOSS.get(kind, 0)


def test_the_default_image_of_an_animated_png_is_shown() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    data = encoded(red, save_all=True, append_images=[blue, blue], default_image=True)
    assert (pixels(data) == (255, 0, 0)).all()


ORIENTATIONS = {
    1: lambda array: array,
    2: np.fliplr,
    3: lambda array: np.rot90(array, 2),
    4: np.flipud,
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
    8: lambda array: np.rot90(array, 1),
}
"""EXIF orientation -> the transformation that shows a file's pixels."""


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upper = RGB_IMAGE.crop((0, 0, SIDE, SIDE // 2))
    data = encoded(upper, kind, exif=exif, **OPTIONS.get(kind, {}))
    expected = ORIENTATIONS[orientation](RGB[: SIDE // 2])
    assert np.abs(pixels(data) - expected).max() <= LOSS.get(kind, 0)
