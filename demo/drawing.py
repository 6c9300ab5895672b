"""Draws images of scenes, and gives the targets of their patches."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from demo.world import (
    ALPHABET,
    COLOUR_NAMES,
    COLOURS,
    PATCH,
    PHOTOS,
    RADII,
    SHAPES,
    TEXTURES,
    Letter,
    Rng,
    Scene,
    Shown,
    Sign,
    Size,
    Thing,
)

Grid = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def _polygon(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star with ``points`` tips; with ``inner`` 1, of a regular polygon."""
    corners = []
    for i in range(2 * points):
        radius = 1.0 if i % 2 == 0 else inner
        angle = math.pi * i / points - math.pi / 2
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.5, -(y + 2) / 16.5))
    return points


_CORNERS = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "star": _polygon(5, 0.42),
    "cross": [
        (-0.32, -0.95),
        (0.32, -0.95),
        (0.32, -0.32),
        (0.95, -0.32),
        (0.95, 0.32),
        (0.32, 0.32),
        (0.32, 0.95),
        (-0.32, 0.95),
        (-0.32, 0.32),
        (-0.95, 0.32),
        (-0.95, -0.32),
        (-0.32, -0.32),
    ],
    "heart": _heart(),
}


def _mask(shape: str, radius: float, angle: float) -> Image.Image:
    """An antialiased mask with the shape in its centre."""
    half = math.ceil(radius * 1.05) + 2
    scale = 3
    tile = Image.new("L", (2 * half * scale, 2 * half * scale))
    draw = ImageDraw.Draw(tile)
    centre, r = half * scale, radius * scale

    def disc(x: float, y: float, size: float, fill: int) -> None:
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)

    if shape in _CORNERS:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        draw.polygon(
            [
                (centre + r * (x * cos - y * sin), centre + r * (x * sin + y * cos))
                for x, y in _CORNERS[shape]
            ],
            fill=255,
        )
    else:
        disc(centre, centre, 0.92 * r, 255)
        if shape == "ring":
            disc(centre, centre, 0.5 * r, 0)
        elif shape == "moon":
            turned = math.radians(angle)
            disc(
                centre + 0.5 * r * math.cos(turned),
                centre + 0.5 * r * math.sin(turned),
                0.75 * r,
                0,
            )
    return tile.resize((2 * half, 2 * half), Image.Resampling.BOX)


def _paint_thing(image: Image.Image, thing: Thing, rng: Rng) -> None:
    jitter = rng.integers(-10, 11, 3)
    colour = np.clip(np.array(COLOURS[thing.colour]) + jitter, 0, 255)
    # An outline in another colour separates the shape from any ground.
    edge = (240, 240, 240) if colour.mean() < 60 else (25, 25, 25)
    for paint, grow in ((edge, 2.0), (tuple(int(c) for c in colour), 0.0)):
        mask = _mask(thing.shape, thing.radius + grow, thing.angle)
        corner = (round(thing.x - mask.width / 2), round(thing.y - mask.height / 2))
        image.paste(paint, corner, mask)


@lru_cache(maxsize=256)
def _font(name: str, height: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), height)


_SPACING = 1.15
"""Distance between letters in letter widths. Above 1, so that letters do not share patches."""


def letter_boxes(sign: Sign) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Each letter and its box (left, top, right, bottom) in pixels."""
    font = _font(sign.font, sign.height)
    boxes = []
    x = sign.x
    for letter in sign.text:
        width = font.getlength(letter)
        _, top, right, bottom = font.getbbox(letter)
        boxes.append((letter, (x, sign.y + top, x + max(width, right), sign.y + bottom)))
        x += width * _SPACING
    return boxes


def sign_box(sign: Sign) -> tuple[float, float, float, float]:
    boxes = [box for _, box in letter_boxes(sign)]
    margin = 5.0
    return (
        boxes[0][0] - margin,
        min(box[1] for box in boxes) - margin,
        boxes[-1][2] + margin,
        max(box[3] for box in boxes) + margin,
    )


def _paint_sign(image: Image.Image, sign: Sign) -> None:
    draw = ImageDraw.Draw(image)
    if sign.plate:
        draw.rounded_rectangle(sign_box(sign), radius=4, fill=sign.ground, outline=sign.ink)
    for letter, (x, *_) in letter_boxes(sign):
        draw.text(
            (x, sign.y),
            letter,
            font=_font(sign.font, sign.height),
            fill=sign.ink,
            stroke_width=0 if sign.plate else 2,
            stroke_fill=sign.ground,
        )


@cache
def _photo(name: str) -> Image.Image:
    """An image that comes with scikit-image, at most 512 pixels high."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    path = next(p for p in folder.glob(f"{name}.*") if p.suffix in {".png", ".jpg"})
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((640, 512))
    return photo


def _paint_ground(size: Size, ground: str, rng: Rng) -> Image.Image:
    tint = rng.integers(60, 215, 3)
    # Muted, so that the ground's colours differ from the colours of things.
    tint = (0.45 * tint + 0.55 * tint.mean()).astype(int)
    if ground == "plain":
        return Image.new("RGB", size, tuple(int(c) for c in tint))
    if ground == "gradient":
        ramp = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize(size)
        ends = np.clip(tint + np.array([[-50], [50]]), 0, 255)
        pixels = np.asarray(ramp, dtype=np.float32)[..., None] / 255
        return Image.fromarray((ends[0] + pixels * (ends[1] - ends[0])).astype(np.uint8))
    if ground == "noise":
        cells = int(rng.integers(min(size) // 24, min(size) // 6))
        coarse = rng.normal(0, 28, (cells, cells, 1)) + rng.normal(0, 8, (cells, cells, 3))
        noise = Image.fromarray(np.clip(tint + coarse, 0, 255).astype(np.uint8))
        return noise.resize(size, Image.Resampling.BICUBIC)
    photo = _photo(ground)
    crop = int(rng.integers(min(min(size) * 3 // 4, min(photo.size)), min(photo.size) + 1))
    left = int(rng.integers(photo.width - crop + 1))
    top = int(rng.integers(photo.height - crop + 1))
    piece = photo.crop((left, top, left + crop, top + crop)).resize(size)
    pixels = np.asarray(piece, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    colour = 0.4 if ground in PHOTOS else 0.0
    muted = grey + colour * (pixels - grey)
    if ground in TEXTURES:
        muted = muted * (tint / 128)
    return Image.fromarray(np.clip(30 + 0.8 * muted, 0, 255).astype(np.uint8))


def draw(scene: Scene) -> Image.Image:
    """The image, (height, width) RGB."""
    rng = np.random.default_rng(scene.seed)
    image = _paint_ground(scene.size, scene.ground, rng)
    for thing in scene.things:
        _paint_thing(image, thing, rng)
    if scene.sign is not None:
        _paint_sign(image, scene.sign)
    return image


@dataclass(frozen=True)
class Cells:
    """A grid of patches over an image of ``size`` pixels."""

    size: Size
    rows: int
    columns: int

    def centres(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Coordinates of the patches' centres: x of each column, y of each row."""
        width, height = self.size
        x = (np.arange(self.columns) + 0.5) * width / self.columns
        return x, (np.arange(self.rows) + 0.5) * height / self.rows


def own_cells(size: Size) -> Cells:
    """The patches of an image that is not resized."""
    return Cells(size, size[1] // PATCH, size[0] // PATCH)


def _patches_in(box: tuple[float, float, float, float], cells: Cells) -> Mask:
    left, top, right, bottom = box
    x, y = cells.centres()
    rows = (y >= top) & (y <= bottom)
    columns = (x >= left) & (x <= right)
    inside: Mask = rows[:, None] & columns[None, :]
    return inside


def patches_of(shown: Shown, cells: Cells) -> Mask:
    """(rows, columns) bool: patches that show a thing, a sign or a letter."""
    if isinstance(shown, Letter):
        return _patches_in(letter_boxes(shown.sign)[shown.index][1], cells)
    if isinstance(shown, Sign):
        boxes = [_patches_in(box, cells) for _, box in letter_boxes(shown)]
        return np.logical_or.reduce(boxes)
    x, y = cells.centres()
    distance = (x[None, :] - shown.x) ** 2 + (y[:, None] - shown.y) ** 2
    near: Mask = distance <= (0.85 * shown.radius) ** 2
    return near


_PARTS = 12
"""Number of rows and columns of an image, of any size, in the targets ``row`` and ``column``."""

TARGETS = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(RADII) + 1,
    "middle": 2,
    "letter": len(ALPHABET) + 1,
    "place": 8,
    "row": _PARTS + 1,
    "column": _PARTS + 1,
}
"""Target of a patch -> number of classes; class 0 means that the patch shows nothing."""


def patch_targets(scene: Scene, cells: Cells | None = None) -> dict[str, Grid]:
    """Target -> (rows, columns) classes of :data:`TARGETS`.

    ``middle`` marks the patch with a thing's centre. ``place`` is a letter's number in its sign.
    ``row`` and ``column`` count twelfths of the image, in patches that show something.

    Args:
        scene: Content of the image.
        cells: The patches; by default those of an image that is not resized.
    """
    cells = cells or own_cells(scene.size)
    shape = (cells.rows, cells.columns)
    width, height = scene.size
    grids = {name: np.zeros(shape, dtype=np.uint8) for name in TARGETS}
    for thing in scene.things:
        inside = patches_of(thing, cells)
        grids["shape"][inside] = SHAPES.index(thing.shape) + 1
        grids["colour"][inside] = COLOUR_NAMES.index(thing.colour) + 1
        grids["size"][inside] = list(RADII).index(thing.size) + 1
        middle = int(thing.y * cells.rows // height), int(thing.x * cells.columns // width)
        grids["middle"][middle] = 1
    if scene.sign is not None:
        for i, (letter, box) in enumerate(letter_boxes(scene.sign)):
            inside = _patches_in(box, cells)
            grids["letter"][inside] = ALPHABET.index(letter) + 1
            grids["place"][inside] = i + 1
    row, column = np.indices(shape) * _PARTS
    row, column = row // cells.rows + 1, column // cells.columns + 1
    shown = (grids["shape"] > 0) | (grids["letter"] > 0)
    # Background has no row and no column, so attention to background adds no wrong values.
    grids["row"][shown], grids["column"][shown] = row[shown], column[shown]
    return grids
