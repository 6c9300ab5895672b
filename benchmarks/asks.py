"""Requests that a bench sends: images of noise, and text of a length that is asked for."""

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

QUESTION = "What is in this picture? Answer in one word."

_WORDS = (
    *("what", "where", "who", "how", "is", "are", "the", "a", "this", "that", "in", "on", "under"),
    *("picture", "house", "street", "colour", "people", "behind", "small", "left", "written"),
    *("describe", "and", "why", "between", "something", "tell", "me", "about", "it"),
)


@dataclass(frozen=True)
class Ask:
    """A request about images of noise.

    Attributes:
        prompt: With the model's marker for each image.
        images: Seeds of their pixels.
        ratio: Pruning ratio, in [0, 1); stock vLLM is not told.
        max_tokens: Length of the answer.
        arrival: Seconds after the clock starts.
        letters: Whether the answer is made of letters. Random weights else answer bytes that
            are no text, and that a next turn would hold as other tokens.
        image_size: Height and width of the images, in pixels.
        max_pixels: What the processor scales larger images down to, where it can.
    """

    prompt: str
    images: tuple[int, ...]
    ratio: float
    max_tokens: int
    arrival: float = 0.0
    letters: bool = False
    image_size: int = 336
    max_pixels: int | None = None


def user_turn(question: str, images: int = 1, marker: str = "<image>") -> str:
    """A question about ``images`` images, in the form LLaVA-1.5 was trained on."""
    return f"USER: {marker * images}\n{question} ASSISTANT:"


def text_of(tokens: int, rng: Random | None = None) -> str:
    """``tokens`` tokens of text: letters, of which the byte tokenizer makes one each."""
    words = cycle(_WORDS) if rng is None else (rng.choice(_WORDS) for _ in range(tokens))
    return " ".join(islice(words, tokens))[:tokens]


def random_image(seed: int, width: int = 336, height: int = 336) -> Any:
    """An image of noise: fine for cost, meaningless for choice."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
