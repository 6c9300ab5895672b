"""Random scenes: things and a sign that do not overlap, on a background."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from demo.drawing import sign_box
from demo.world import (
    COLOUR_NAMES,
    FONTS,
    PHOTOS,
    RADII,
    SHAPES,
    SIDE,
    SQUARE,
    TEXTURES,
    WORDS,
    Rng,
    Scene,
    Sign,
    Size,
    Thing,
)


def choice(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def random_size(rng: Rng, side: int = SIDE) -> Size:
    """A size with about the area of a square of ``side`` pixels; its sides differ up to 2 to 1."""
    stretch = float(np.exp(rng.uniform(-0.35, 0.35)))
    return round(side * stretch), round(side / stretch)


class _FullError(Exception):
    """The image has no free box of the wanted size."""


@dataclass
class _Room:
    """The occupied boxes of an image."""

    size: Size
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def large(self) -> bool:
        """Whether the image has about the area of an exam's image, whatever its form."""
        return self.size[0] * self.size[1] >= 0.97 * SIDE**2

    def place(self, width: float, height: float, rng: Rng) -> tuple[float, float]:
        """Reserve a free box. Returns its left and top in pixels.

        Raises:
            _FullError: If no free box is found.
        """
        across, down = self.size[0] - width - 3, self.size[1] - height - 3
        if min(across, down) < 3:
            raise _FullError
        for _ in range(60):
            x, y = float(rng.uniform(3, across)), float(rng.uniform(3, down))
            box = (x - 4, y - 4, x + width + 4, y + height + 4)
            if all(
                box[2] < a or box[0] > c or box[3] < b or box[1] > d for a, b, c, d in self.taken
            ):
                self.taken.append(box)
                return x, y
        raise _FullError


def _make_sign(room: _Room, rng: Rng) -> Sign:
    if rng.random() < 0.6:
        text = choice(rng, WORDS)
    else:
        digits = int(rng.integers(2, 5))
        text = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
    light = tuple(int(c) for c in rng.integers(215, 256, 3))
    dark = tuple(int(c) for c in rng.integers(0, 60, 3))
    ink, ground = (dark, light) if rng.random() < 0.5 else (light, dark)
    sign = Sign(
        text=text,
        font=choice(rng, FONTS),
        height=int(rng.integers(25, 42 if room.large else 34)),
        x=0.0,
        y=0.0,
        ink=ink,  # type: ignore[arg-type]
        ground=ground,  # type: ignore[arg-type]
        plate=bool(rng.random() < 0.6),
    )
    left, top, right, bottom = sign_box(sign)
    x, y = room.place(right - left, bottom - top, rng)
    return replace(sign, x=x - left, y=y - top)


def _make_thing(room: _Room, rng: Rng, shape: str, colour: str, size: str) -> Thing:
    radius = float(rng.uniform(*RADII[size]))
    x, y = room.place(2 * radius, 2 * radius, rng)
    angle = float(rng.uniform(-14, 14)) + (180.0 if shape == "moon" and rng.random() < 0.5 else 0)
    return Thing(shape, colour, size, x + radius, y + radius, radius, angle)


def _make_odd_one_out(room: _Room, rng: Rng) -> tuple[list[Thing], Thing]:
    """Equal things and one that differs in shape or colour, in random order; and the odd one."""
    shape, colour = choice(rng, SHAPES), choice(rng, COLOUR_NAMES)
    other_shape, other_colour = shape, colour
    if rng.random() < 0.5:
        other_shape = choice(rng, [s for s in SHAPES if s != shape])
    else:
        other_colour = choice(rng, [c for c in COLOUR_NAMES if c != colour])
    size = "small" if not room.large or rng.random() < 0.5 else "big"
    count = int(rng.integers(3, 6 if room.large else 5))
    odd = _make_thing(room, rng, other_shape, other_colour, size)
    things = [_make_thing(room, rng, shape, colour, size) for _ in range(count - 1)]
    things.insert(int(rng.integers(count)), odd)
    return things, odd


def _make_things(room: _Room, rng: Rng, min_things: int, max_things: int) -> list[Thing]:
    things: list[Thing] = []
    for _ in range(int(rng.integers(min_things, max_things + 1))):
        shape, colour = choice(rng, SHAPES), choice(rng, COLOUR_NAMES)
        if things and rng.random() < 0.3:  # equal shapes or colours make counting and naming harder
            shape = choice(rng, things).shape
        if things and rng.random() < 0.3:
            colour = choice(rng, things).colour
        size = "small" if rng.random() < (0.5 if room.large else 0.75) else "big"
        things.append(_make_thing(room, rng, shape, colour, size))
    return things


def _make_ground(rng: Rng) -> str:
    roll = rng.random()
    if roll < 0.3:
        kinds: Sequence[str] = ("plain", "gradient")
    elif roll < 0.6:
        kinds = ("noise", *TEXTURES)
    else:
        kinds = PHOTOS
    return str(choice(rng, kinds))


def make_scene(rng: Rng, size: Size = SQUARE, kind: str | None = None) -> Scene:
    """A random scene.

    Args:
        rng: Source of all choices.
        size: Width and height of the image in pixels.
        kind: ``odd`` for equal things with one odd one out, ``sign`` for a scene with a sign,
            ``None`` for a random scene.
    """
    while True:
        room = _Room(size)
        sign = odd = None
        try:
            if kind == "sign" or (kind is None and rng.random() < 0.5):
                sign = _make_sign(room, rng)
            if kind == "odd":
                things, odd = _make_odd_one_out(room, rng)
            else:
                # With a single thing, the model could answer without reading the question.
                max_things = 5 if room.large else 3 if sign else 4
                things = _make_things(room, rng, 1 if sign else 2, max_things)
        except _FullError:
            continue
        return Scene(size, tuple(things), sign, _make_ground(rng), int(rng.integers(2**31)), odd)
