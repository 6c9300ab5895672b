"""Photographs, and text on them in a font of the demo's world."""

from PIL import Image, ImageDraw, ImageFont
from skimage import data

PHOTOS = ("astronaut", "coffee", "cat", "rocket", "camera")
LINES = ["Invoice 4711 of 3 May", "2 lamps 40.50", "1 table 99.00", "Total 139.50"]


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB").resize((672, 672))


def write(image: Image.Image, lines: int) -> Image.Image:
    """Black text with a white rim, which stands out from any ground."""
    written = image.copy()
    font = ImageFont.load_default(size=28)
    for number in range(lines):
        place = (30, 30 + 40 * number)
        text = LINES[number % len(LINES)]
        draw = ImageDraw.Draw(written)
        draw.text(place, text, "black", font, stroke_width=2, stroke_fill="white")
    return written
