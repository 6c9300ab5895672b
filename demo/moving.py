"""The page's sample video: moving shapes. ``python -m demo.moving FILE.webm`` writes it."""

import sys
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image

from demo.drawing import draw
from demo.world import SIDE, SQUARE, Scene, Thing

SECONDS = 6
FPS = 8

Place = tuple[float, float]
"""x and y in pixels."""

MOVES: tuple[tuple[str, str, Place, Place, float, float], ...] = (
    ("moon", "purple", (280, 70), (280, 70), 0, 1),
    ("circle", "red", (-40, 180), (376, 180), 0, 6),
    ("star", "yellow", (90, -40), (90, 80), 1.5, 3),
    ("square", "green", (180, 376), (180, 280), 3.5, 5),
)
"""Shape, colour, first and last place, and the seconds between which the shape moves."""


def scene_at(second: float) -> Scene:
    """The shapes at a time."""
    things = []
    for shape, colour, first, last, start, end in MOVES:
        share = np.clip((second - start) / (end - start), 0, 1)
        x, y = (float(a + share * (b - a)) for a, b in zip(first, last, strict=True))
        things.append(Thing(shape, colour, "big", x, y, radius=34.0, angle=0.0))
    return Scene(SQUARE, tuple(things), sign=None, ground="gradient", seed=1)


def frames() -> Iterator[Image.Image]:
    """The frames of the video, in order."""
    for index in range(SECONDS * FPS):
        yield draw(scene_at(index / FPS))


def write_video(path: str) -> None:
    """Write the video as VP8 in WebM, which browsers play and vLLM's loader reads.

    Raises:
        OSError: If OpenCV cannot write the file.
    """
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"VP80"), FPS, (SIDE, SIDE))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write VP8 to {path}")
    for frame in frames():
        writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))
    writer.release()


if __name__ == "__main__":
    write_video(sys.argv[1])
