"""A small world of pictures with questions about them, endless and seeded.

Coloured shapes and a written sign stand on plain, textured or photographed ground. The demo
model is trained on this world and examined on it, with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SIDE = 336
"""Height and width of an examined picture in pixels; objects keep their size on others."""

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 132, 24),
    "yellow": (250, 220, 40),
    "green": (46, 158, 64),
    "blue": (40, 90, 220),
    "purple": (142, 60, 178),
    "white": (246, 246, 246),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
RADII = {"small": (17, 21), "big": (31, 38)}  # pixels
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_WORDS = """
ANT APE ARM ART ASH BAG BAKE BANK BAR BARN BAT BEAR BED BEE BELL BIKE BIRD BOAT BONE BOOK BOX
BREAD BUS CAB CAFE CAKE CAMP CAR CAT CHAIR CITY CLOCK COAT COFFEE COIN COW CROWN CUP DANCE DAY
DEER DESK DOG DOOR DRUM DUCK EAST EGG EXIT FARM FERRY FILM FIRE FISH FLAG FOG FOX FROG GAME GATE
GOAT GOLD GRAPE HAND HAT HEN HILL HOME HORSE HOTEL HOUR ICE INK IRON JAM JAR JAZZ JUICE KEY KING
KITE LAKE LAMP LEAF LEMON LION MAIL MAP MARKET MILK MINT MOON MOUSE MUSIC NEST NIGHT NORTH NUT
OAK OIL OPEN OVEN OWL PARK PEAR PEN PIANO PIE PLUM POND POST QUEEN QUIZ RAIN RIVER ROAD ROBOT
ROSE SALT SAND SHIP SHOE SHOP SILK SNOW SOAP SOUP SOUTH STOP SUN TAXI TEA TENT TIGER TOWER TRAIN
TREE TRUCK TUNA VAN VASE VIEW WALL WAX WEST WHALE WIND WOLF WOOD YARD YEAR ZEBRA ZERO ZOO
"""
WORDS = tuple(_WORDS.split())

Rng = np.random.Generator
Grid = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """A coloured shape. ``x``, ``y`` and ``radius`` in pixels, ``angle`` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A written word or number.

    Attributes:
        text: Capital letters or digits.
        font: One of :data:`FONTS`.
        height: Font size in pixels.
        x, y: Left and top of the text in pixels.
        ink: Colour of the letters, RGB.
        ground: Colour of the plate behind them, RGB, or of their outline.
        plate: Whether the letters stand on a plate; otherwise on the picture, outlined.
    """

    text: str
    font: str
    height: int
    x: float
    y: float
    ink: tuple[int, int, int]
    ground: tuple[int, int, int]
    plate: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``ground`` names the background; ``seed`` fixes its details."""

    side: int
    things: tuple[Thing, ...]
    sign: Sign | None
    ground: str
    seed: int
    odd: Thing | None = None


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """Pictures, and one or more turns of conversation about them."""

    family: str
    pictures: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]


# --- drawing ---------------------------------------------------------------------------


def _polygon(points: int, inner: float) -> list[tuple[float, float]]:
    """A star of ``points`` tips, or a regular polygon where ``inner`` is 1."""
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
        (x, y)
        for x, y in (
            *((-0.32, -0.95), (0.32, -0.95), (0.32, -0.32), (0.95, -0.32)),
            *((0.95, 0.32), (0.32, 0.32), (0.32, 0.95), (-0.32, 0.95)),
            *((-0.32, 0.32), (-0.95, 0.32), (-0.95, -0.32), (-0.32, -0.32)),
        )
    ],
    "heart": _heart(),
}


def _mask(shape: str, radius: float, angle: float) -> Image.Image:
    """The shape as an antialiased mask, centred."""
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


def _paint_thing(picture: Image.Image, thing: Thing, rng: Rng) -> None:
    jitter = rng.integers(-10, 11, 3)
    colour = np.clip(np.array(COLOURS[thing.colour]) + jitter, 0, 255)
    # An outline that differs from the filling sets it off from any ground.
    edge = (240, 240, 240) if colour.mean() < 60 else (25, 25, 25)
    for paint, grow in ((edge, 2.0), (tuple(int(c) for c in colour), 0.0)):
        mask = _mask(thing.shape, thing.radius + grow, thing.angle)
        corner = (round(thing.x - mask.width / 2), round(thing.y - mask.height / 2))
        picture.paste(paint, corner, mask)


FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneralBol"),
)
"""Free fonts that come with Matplotlib."""


@lru_cache(maxsize=256)
def _font(name: str, height: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), height)


_SPACING = 1.15
"""Letters stand a little apart, so that each has patches of its own."""


def _letter_boxes(sign: Sign) -> list[tuple[str, tuple[float, float, float, float]]]:
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


def _sign_box(sign: Sign) -> tuple[float, float, float, float]:
    boxes = [box for _, box in _letter_boxes(sign)]
    margin = 5.0
    return (
        boxes[0][0] - margin,
        min(box[1] for box in boxes) - margin,
        boxes[-1][2] + margin,
        max(box[3] for box in boxes) + margin,
    )


def _paint_sign(picture: Image.Image, sign: Sign) -> None:
    draw = ImageDraw.Draw(picture)
    if sign.plate:
        draw.rounded_rectangle(_sign_box(sign), radius=4, fill=sign.ground, outline=sign.ink)
    for letter, (x, *_) in _letter_boxes(sign):
        draw.text(
            (x, sign.y),
            letter,
            font=_font(sign.font, sign.height),
            fill=sign.ink,
            stroke_width=0 if sign.plate else 2,
            stroke_fill=sign.ground,
        )


PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "moon", "motorcycle_left")
TEXTURES = ("brick", "grass", "gravel")
GROUNDS = ("plain", "gradient", "noise", *TEXTURES, *PHOTOS)


@cache
def _photo(name: str) -> Image.Image:
    """A picture that comes with scikit-image, at most 512 pixels high."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    path = next(p for p in folder.glob(f"{name}.*") if p.suffix in {".png", ".jpg"})
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((640, 512))
    return photo


def _paint_ground(side: int, ground: str, rng: Rng) -> Image.Image:
    tint = rng.integers(60, 215, 3)
    # Muted: colours of the ground must not be taken for colours of things.
    tint = (0.45 * tint + 0.55 * tint.mean()).astype(int)
    if ground == "plain":
        return Image.new("RGB", (side, side), tuple(int(c) for c in tint))
    if ground == "gradient":
        ramp = Image.linear_gradient("L").rotate(90 * int(rng.integers(4))).resize((side, side))
        ends = np.clip(tint + np.array([[-50], [50]]), 0, 255)
        pixels = np.asarray(ramp, dtype=np.float32)[..., None] / 255
        return Image.fromarray((ends[0] + pixels * (ends[1] - ends[0])).astype(np.uint8))
    if ground == "noise":
        cells = int(rng.integers(side // 24, side // 6))
        coarse = rng.normal(0, 28, (cells, cells, 1)) + rng.normal(0, 8, (cells, cells, 3))
        noise = Image.fromarray(np.clip(tint + coarse, 0, 255).astype(np.uint8))
        return noise.resize((side, side), Image.Resampling.BICUBIC)
    photo = _photo(ground)
    crop = int(rng.integers(min(side * 3 // 4, min(photo.size)), min(photo.size) + 1))
    left = int(rng.integers(photo.width - crop + 1))
    top = int(rng.integers(photo.height - crop + 1))
    piece = photo.crop((left, top, left + crop, top + crop)).resize((side, side))
    pixels = np.asarray(piece, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    colour = 0.4 if ground in PHOTOS else 0.0
    muted = grey + colour * (pixels - grey)
    if ground in TEXTURES:
        muted = muted * (tint / 128)
    return Image.fromarray(np.clip(30 + 0.8 * muted, 0, 255).astype(np.uint8))


def draw(scene: Scene) -> Image.Image:
    """The picture, (side, side) RGB."""
    rng = np.random.default_rng(scene.seed)
    picture = _paint_ground(scene.side, scene.ground, rng)
    for thing in scene.things:
        _paint_thing(picture, thing, rng)
    if scene.sign is not None:
        _paint_sign(picture, scene.sign)
    return picture


# --- composing -------------------------------------------------------------------------


def _choice(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


class _FullError(Exception):
    """No room is left in the picture."""


@dataclass
class _Room:
    """Where things stand already."""

    side: int
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def place(self, width: float, height: float, rng: Rng) -> tuple[float, float]:
        """Left and top of a free box, which is free no longer."""
        if max(width, height) > self.side - 6:
            raise _FullError
        for _ in range(60):
            x = float(rng.uniform(3, self.side - width - 3))
            y = float(rng.uniform(3, self.side - height - 3))
            box = (x - 4, y - 4, x + width + 4, y + height + 4)
            if all(
                box[2] < a or box[0] > c or box[3] < b or box[1] > d for a, b, c, d in self.taken
            ):
                self.taken.append(box)
                return x, y
        raise _FullError


def _make_sign(room: _Room, rng: Rng) -> Sign:
    if rng.random() < 0.6:
        text = _choice(rng, WORDS)
    else:
        digits = int(rng.integers(2, 5))
        text = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
    light = tuple(int(c) for c in rng.integers(215, 256, 3))
    dark = tuple(int(c) for c in rng.integers(0, 60, 3))
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    sign = Sign(
        text=text,
        font=_choice(rng, FONTS),
        height=int(rng.integers(25, 34 if room.side < SIDE else 42)),
        x=0.0,
        y=0.0,
        ink=ink,  # type: ignore[arg-type]
        ground=ground,  # type: ignore[arg-type]
        plate=bool(rng.random() < 0.6),
    )
    left, top, right, bottom = _sign_box(sign)
    x, y = room.place(right - left, bottom - top, rng)
    return Sign(**{**sign.__dict__, "x": x - left, "y": y - top})


def _make_thing(room: _Room, rng: Rng, shape: str, colour: str, size: str) -> Thing:
    radius = float(rng.uniform(*RADII[size]))
    x, y = room.place(2 * radius, 2 * radius, rng)
    angle = float(rng.uniform(-14, 14)) + (180.0 if shape == "moon" and rng.random() < 0.5 else 0)
    return Thing(shape, colour, size, x + radius, y + radius, radius, angle)


def make_scene(rng: Rng, side: int = SIDE, kind: str | None = None) -> Scene:
    """A random scene.

    Args:
        rng: Source of all choices.
        side: Height and width of the picture in pixels.
        kind: ``odd`` for equal things with one odd one out, ``sign`` for one that has a
            sign, ``None`` for whatever comes.
    """
    large = side >= SIDE
    while True:
        room = _Room(side)
        try:
            sign = None
            if kind == "sign" or (kind is None and rng.random() < 0.5):
                sign = _make_sign(room, rng)
            odd = None
            things: list[Thing] = []
            if kind == "odd":
                shape, colour = _choice(rng, SHAPES), _choice(rng, list(COLOURS))
                other_shape, other_colour = shape, colour
                if rng.random() < 0.5:
                    other_shape = _choice(rng, [s for s in SHAPES if s != shape])
                else:
                    other_colour = _choice(rng, [c for c in COLOURS if c != colour])
                size = "small" if not large or rng.random() < 0.5 else "big"
                count = int(rng.integers(3, 6 if large else 5))
                odd = _make_thing(room, rng, other_shape, other_colour, size)
                things = [_make_thing(room, rng, shape, colour, size) for _ in range(count - 1)]
                things.insert(int(rng.integers(count)), odd)
            else:
                most = (6 if large else 4) - (0 if sign is None or large else 1)
                for _ in range(int(rng.integers(0 if sign else 1, most))):
                    shape, colour = _choice(rng, SHAPES), _choice(rng, list(COLOURS))
                    if things and rng.random() < 0.3:  # something to count, and to confuse
                        shape = _choice(rng, things).shape
                    if things and rng.random() < 0.3:
                        colour = _choice(rng, things).colour
                    size = "small" if rng.random() < 0.5 else "big"
                    things.append(_make_thing(room, rng, shape, colour, size))
        except _FullError:
            continue
        roll = rng.random()
        if roll < 0.3:
            ground = _choice(rng, ("plain", "gradient"))
        elif roll < 0.6:
            ground = _choice(rng, ("noise", *TEXTURES))
        else:
            ground = _choice(rng, PHOTOS)
        return Scene(side, tuple(things), sign, ground, int(rng.integers(2**31)), odd)


# --- asking ----------------------------------------------------------------------------


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _place(thing: Thing, side: int) -> str | None:
    """Which ninth of the picture a thing's centre is in; ``None`` near a border of two."""
    names = []
    for value, labels in ((thing.y, ROWS), (thing.x, COLUMNS)):
        part = 3 * value / side
        if min(abs(part - 1), abs(part - 2)) < 0.12:
            return None
        names.append(labels[min(int(part), 2)])
    return " ".join(names)


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """Things that no other equals in ``key``."""
    keys = [key(thing) for thing in things]
    return [thing for thing in things if keys.count(key(thing)) == 1]


def _identified(things: Sequence[Thing], rng: Rng) -> tuple[Thing, str] | None:
    """A thing that words single out, and the words."""
    options = [(thing, thing.name) for thing in _unique(things, lambda t: t.name)]
    options += [(thing, thing.shape) for thing in _unique(things, lambda t: t.shape)]
    return _choice(rng, options) if options else None


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def ask_colour(scene: Scene, rng: Rng) -> Turn | None:
    candidates = _unique(scene.things, lambda t: t.shape)
    if not candidates:
        return None
    thing = _choice(rng, candidates)
    wording = _choice(rng, ("What colour is the {}?", "What is the colour of the {}?"))
    return Turn(wording.format(thing.shape), thing.colour)


def ask_shape(scene: Scene, rng: Rng) -> Turn | None:
    candidates = _unique(scene.things, lambda t: t.colour)
    if not candidates:
        return None
    thing = _choice(rng, candidates)
    wording = _choice(rng, ("What shape is the {} object?", "What is the {} thing?"))
    return Turn(wording.format(thing.colour), thing.shape)


def ask_size(scene: Scene, rng: Rng) -> Turn | None:
    found = _identified(scene.things, rng)
    if found is None:
        return None
    wording = _choice(rng, ("Is the {} small or big?", "How big is the {}?"))
    return Turn(wording.format(found[1]), found[0].size)


def ask_position(scene: Scene, rng: Rng) -> Turn | None:
    found = _identified(scene.things, rng)
    place = _place(found[0], scene.side) if found else None
    if found is None or place is None:
        return None
    wording = _choice(rng, ("Where is the {}?", "In which part of the picture is the {}?"))
    return Turn(wording.format(found[1]), place)


def ask_count(scene: Scene, rng: Rng) -> Turn | None:
    roll = rng.random()
    if roll < 0.35:
        wording = _choice(rng, ("How many objects are there?", "Count the objects."))
        return Turn(wording, str(len(scene.things)))
    here = scene.things and rng.random() < 0.75
    if roll < 0.7:
        colour = _choice(rng, scene.things).colour if here else _choice(rng, list(COLOURS))
        count = sum(thing.colour == colour for thing in scene.things)
        return Turn(f"How many {colour} objects are there?", str(count))
    shape = _choice(rng, scene.things).shape if here else _choice(rng, SHAPES)
    count = sum(thing.shape == shape for thing in scene.things)
    return Turn(f"How many {_plural(shape)} are there?", str(count))


def ask_existence(scene: Scene, rng: Rng) -> Turn | None:
    wanted = rng.random() < 0.5
    colour, shape = _choice(rng, list(COLOURS)), _choice(rng, SHAPES)
    if scene.things:
        thing = _choice(rng, scene.things)
        if wanted:
            colour, shape = thing.colour, thing.shape
        elif rng.random() < 0.6:  # half right is the harder no
            colour, shape = (thing.colour, shape) if rng.random() < 0.5 else (colour, thing.shape)
    here = any(t.colour == colour and t.shape == shape for t in scene.things)
    wording = _choice(rng, ("Is there {}?", "Can you see {}?"))
    return Turn(wording.format(_article(f"{colour} {shape}")), "yes" if here else "no")


_RELATIONS: tuple[tuple[str, Callable[[Thing, Thing], float]], ...] = (
    ("left of", lambda a, b: b.x - a.x),
    ("right of", lambda a, b: a.x - b.x),
    ("above", lambda a, b: b.y - a.y),
    ("below", lambda a, b: a.y - b.y),
)


def ask_relation(scene: Scene, rng: Rng) -> Turn | None:
    named = _unique(scene.things, lambda t: t.name)
    if len(named) < 2:
        return None
    first, second = (named[int(i)] for i in rng.permutation(len(named))[:2])
    words, margin = _choice(rng, _RELATIONS)
    if abs(margin(first, second)) < 30:
        return None
    return Turn(
        f"Is the {first.name} {words} the {second.name}?",
        "yes" if margin(first, second) > 0 else "no",
    )


def ask_text(scene: Scene, rng: Rng) -> Turn | None:
    if scene.sign is None and rng.random() < 0.8:
        return None
    wording = _choice(rng, ("What does the sign say?", "What is written here?", "Read the text."))
    return Turn(wording, scene.sign.text if scene.sign else "nothing")


def ask_odd(scene: Scene, rng: Rng) -> Turn | None:
    if scene.odd is None:
        return None
    wording = _choice(rng, ("Which object is the odd one out?", "Which object is different?"))
    return Turn(wording, scene.odd.name)


def ask_description(scene: Scene, rng: Rng) -> Turn | None:
    """Everything in the picture, left to right, the sign last."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    if any(right.x - left.x < 12 for left, right in pairwise(things)):
        return None
    parts = [f"{thing.size} {thing.name}" for thing in things]
    if scene.sign is not None:
        parts.append(f"sign {scene.sign.text}")
    wording = _choice(rng, ("What is in the picture?", "Describe the picture."))
    return Turn(wording, ", ".join(parts))


def ask_follow_up(scene: Scene, rng: Rng) -> tuple[Turn, ...] | None:
    """Two turns; the second speaks of the first one's object as "it"."""
    candidates = _unique(scene.things, lambda t: t.colour)
    if not candidates:
        return None
    thing = _choice(rng, candidates)
    first = Turn(f"What shape is the {thing.colour} object?", thing.shape)
    place = _place(thing, scene.side)
    if place is None or rng.random() < 0.5:
        return first, Turn("Is it small or big?", thing.size)
    return first, Turn("Where is it?", place)


def ask_comparison(scenes: Sequence[Scene], rng: Rng) -> Turn | None:
    """About two pictures."""
    names = [{thing.name for thing in scene.things} for scene in scenes]
    if rng.random() < 0.6:
        which = int(rng.integers(2))
        only = sorted(names[which] - names[1 - which])
        if not only:
            return None
        ordinal = ("first", "second")[which]
        return Turn(f"Which picture shows {_article(_choice(rng, only))}?", ordinal)
    shapes = [{thing.shape for thing in scene.things} for scene in scenes]
    both = sorted(shapes[0] & shapes[1])
    wanted = bool(both) and rng.random() < 0.6
    others = sorted(shapes[0] ^ shapes[1])
    if not wanted and not others:
        return None
    shape = _choice(rng, both if wanted else others)
    return Turn(f"Do both pictures show {_article(shape)}?", "yes" if wanted else "no")


Ask = Callable[[Scene, Rng], Turn | None]

SINGLE: dict[str, Ask] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "size": ask_size,
    "position": ask_position,
    "count": ask_count,
    "existence": ask_existence,
    "relation": ask_relation,
    "text": ask_text,
    "odd one out": ask_odd,
    "description": ask_description,
}
FAMILIES = (*SINGLE, "dialogue", "two pictures")
_KIND = {"odd one out": "odd", "text": "sign"}


def compose(family: str, rng: Rng, side: int = SIDE) -> tuple[list[Scene], tuple[Turn, ...]]:
    """Scenes and a conversation about them, of one family of questions."""
    while True:
        if family == "two pictures":
            pair = [make_scene(rng, side), make_scene(rng, side)]
            turn = ask_comparison(pair, rng)
            if turn is not None:
                return pair, (turn,)
            continue
        kind = _KIND.get(family) if rng.random() < 0.9 else None
        scene = make_scene(rng, side, kind)
        if family == "dialogue":
            turns = ask_follow_up(scene, rng)
        else:
            turn = SINGLE[family](scene, rng)
            turns = None if turn is None else (turn,)
        if turns is not None:
            return [scene], turns


EXAM_SEED = 2**40
"""Training draws from seeds below, exams from seeds above."""


def exam(per_family: int, seed: int = 0) -> list[Example]:
    """A fixed set of questions that training has never seen.

    Args:
        per_family: Conversations per family.
        seed: Another seed, another exam.
    """
    examples = []
    for family_index, family in enumerate(FAMILIES):
        for i in range(per_family):
            rng = np.random.default_rng([EXAM_SEED + seed, family_index, i])
            scenes, turns = compose(family, rng)
            examples.append(Example(family, tuple(draw(s) for s in scenes), turns))
    return examples


# --- what is where, for training -------------------------------------------------------

TARGETS = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(RADII) + 1,
    "middle": 2,
    "letter": len(ALPHABET) + 1,
    "place": 8,
}
"""Name -> classes of what a patch may be asked about; class 0 is nothing."""


def patch_targets(scene: Scene, patch: int = 14) -> dict[str, Grid]:
    """What each patch shows: name -> (side/patch, side/patch) classes of :data:`TARGETS`.

    ``middle`` marks the patch with a thing's centre, ``place`` counts a sign's letters.
    """
    cells = scene.side // patch
    grids = {name: np.zeros((cells, cells), dtype=np.uint8) for name in TARGETS}
    centres = (np.arange(cells) + 0.5) * patch
    for thing in scene.things:
        near = (centres[None, :] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2
        inside = near <= (0.85 * thing.radius) ** 2
        grids["shape"][inside] = SHAPES.index(thing.shape) + 1
        grids["colour"][inside] = list(COLOURS).index(thing.colour) + 1
        grids["size"][inside] = list(RADII).index(thing.size) + 1
        grids["middle"][int(thing.y // patch), int(thing.x // patch)] = 1
    if scene.sign is not None:
        for i, (letter, (left, top, right, bottom)) in enumerate(_letter_boxes(scene.sign)):
            rows = (centres >= top) & (centres <= bottom)
            columns = (centres >= left) & (centres <= right)
            box = rows[:, None] & columns[None, :]
            grids["letter"][box] = ALPHABET.index(letter) + 1
            grids["place"][box] = i + 1
    return grids


def corpus(lines: int, seed: int = 0) -> Iterator[str]:
    """Questions and lower-case answers, to train a tokenizer on."""
    rng = np.random.default_rng(seed)
    for _ in range(lines):
        _, turns = compose(_choice(rng, FAMILIES), rng)
        for turn in turns:
            yield turn.question
            if turn.answer.islower():
                yield f" {turn.answer}"
