"""The page's sample video is the one that the program draws."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from demo.moving import FPS, MOVES, SECONDS, frames, scene_at, write_video

SAMPLE = Path(__file__).parents[2] / "server" / "vitcop_server" / "samples" / "shapes.webm"


def decoded(path: Path) -> list[npt.NDArray[np.uint8]]:
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == FPS
    found = []
    while (read := video.read())[0]:
        found.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return found  # type: ignore[return-value]


def test_the_sample_shows_the_frames_that_the_program_draws(tmp_path: Path) -> None:
    write_video(str(tmp_path / "again.webm"))
    drawn = [np.asarray(frame, dtype=int) for frame in frames()]
    for path in (SAMPLE, tmp_path / "again.webm"):
        shown = decoded(path)
        assert len(shown) == len(drawn) == SECONDS * FPS
        for one, other in zip(shown, drawn, strict=True):
            assert abs(one - other).mean() < 3  # VP8 loses a little


def test_shapes_come_in_and_move_as_listed() -> None:
    for number, (shape, colour, first, last, start, end) in enumerate(MOVES):
        for second, place in ((start, first), (end, last), (SECONDS, last)):
            thing = scene_at(second).things[number]
            assert (thing.shape, thing.colour, (thing.x, thing.y)) == (shape, colour, place)
