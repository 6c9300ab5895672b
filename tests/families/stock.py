"""Requests sent to stock vLLM, in one child process per family."""

from dataclasses import replace

from tests.engine.requests import RequestSpec
from tests.families.family import Family

TOGETHER = [
    RequestSpec("What is this?", (1,), 0.0),
    RequestSpec("What is this?", (2,), 0.0, max_tokens=24),
    RequestSpec("Compare the two images, please.", (3, 4), 0.0),
    RequestSpec("And without a ratio?", (5,)),
    RequestSpec("No image at all."),
    RequestSpec("Tell me a story", (6,), 0.0, sampling={"temperature": 1.0, "seed": 7}),
    RequestSpec(
        "Tell me a story", (6,), 0.0, sampling={"temperature": 0.8, "top_p": 0.9, "seed": 8}
    ),
    RequestSpec("Hello", sampling={"temperature": 1.2, "top_k": 20, "seed": 9}),
    RequestSpec("Three, of which two are thin", (101, 7, 102), 0.0),
]

IN_TURN = [
    RequestSpec(text, images, system="x" * length, max_tokens=2)
    for length in (0, 7, 13, 20, 26)
    for images in ((1,), (2, 3))
    for text in ("What is it?", "And where was that, please?", "Name it.")
]
"""Requests in groups of three that share their images and the text before them."""

VIDEOS = [
    RequestSpec("What happens?", ratio=0.0, videos=(1,)),
    RequestSpec("Which is longer?", ratio=0.0, videos=(2, 3), max_tokens=12),
    RequestSpec("Is it in the image?", (1, 2), 0.0, videos=(5, 1), order="vivi"),
    RequestSpec("And without a ratio?", videos=(4,)),
]
"""Requests for families that take videos, sent one after the other."""

VIDEOS_OF_ONE_LENGTH = [
    replace(spec, videos=videos)
    for spec, videos in zip(VIDEOS, [(1,), (6, 1), (1, 6), (4,)], strict=True)
]
"""The same, with videos of equally many frames in each request."""


def videos_of(family: Family) -> list[RequestSpec]:
    """Requests with videos that stock vLLM can answer."""
    if family.frames is None:
        return []
    return VIDEOS if family.stock_joins_videos else VIDEOS_OF_ONE_LENGTH


WITH_RATIO = RequestSpec("Q", (1,), 8 / 9)
"""A request with a ratio, which stock vLLM ignores."""
