"""The bench's requests: images and videos of noise, and text of a known length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

QUESTION = "What is in this picture? Answer in one word."


FILE_FRAMES = 2
"""Frames of a video's file that the encoder joins into one."""


@dataclass(frozen=True)
class ImageRequest:
    """A request about images of noise, or about a video.

    Attributes:
        prompt: Text, with the model's marker for each image, or for the video.
        images: Seeds of the images' pixels, or of the video's frames, as the encoder computes them.
        ratio: Pruning ratio, in [0, 1); not sent to stock vLLM.
        max_tokens: Length of the answer.
        letters: Allow only letters in the answer. Random weights also produce bytes that are no
            valid text; the next turn's prompt would encode these as other tokens.
        image_size: Height and width of the images, in pixels.
        is_video: Whether the images are the frames of one video.
    """

    prompt: str
    images: tuple[int, ...]
    ratio: float
    max_tokens: int
    letters: bool = False
    image_size: int = 336
    is_video: bool = False


def user_turn(question: str, images: int = 1, marker: str = "<image>") -> str:
    """A question about ``images`` images, in the form that LLaVA-1.5 was trained on."""
    return f"USER: {marker * images}\n{question} ASSISTANT:"


def filler_text(tokens: int) -> str:
    """Text of ``tokens`` tokens: the byte tokenizer makes a token of each letter."""
    return ("tell me what is in this picture and why " * tokens)[:tokens]


def random_image(seed: int, width: int = 336, height: int = 336) -> Any:
    """An image of noise: it costs as much as a photo, but has no content to select."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def video_data(frames: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """Frames of the file, and vLLM's description of it.

    Args:
        frames: Images that the encoder computes, a second of the video each.
    """
    import numpy as np

    pixels = np.stack([np.asarray(frame) for frame in frames]).repeat(FILE_FRAMES, axis=0)
    return pixels, {
        "fps": float(FILE_FRAMES),
        "duration": float(len(frames)),
        "total_num_frames": len(pixels),
        "frames_indices": list(range(len(pixels))),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
