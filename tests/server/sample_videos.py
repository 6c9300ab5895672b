"""Video files."""

import base64
import tempfile
from pathlib import Path

import cv2
import numpy as np


def video_file(
    frames: int = 12, size: tuple[int, int] = (160, 120), fps: float = 6.0, kind: str = "mp4"
) -> bytes:
    """A file in which a square moves; ``size`` is width and height."""
    codec = {"mp4": "mp4v", "avi": "MJPG", "webm": "VP80"}[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"video.{kind}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
        assert writer.isOpened()
        for number in range(frames):
            frame = np.full((size[1], size[0], 3), 40, dtype=np.uint8)
            left = (size[0] - 30) * number // max(frames - 1, 1)
            frame[20:50, left : left + 30] = 20 * number % 256, 200, 90
            writer.write(frame)
        writer.release()
        return path.read_bytes()


def video_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()
