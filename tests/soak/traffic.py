"""An endless mix of requests, from a seed."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from tests.engine.requests import RequestSpec

RATIOS = (0.0, 0.3, 0.5, 2 / 3, 7 / 9, 8 / 9, 17 / 18)

MAX_TEXT_TOKENS = 768
"""Tokens of a prompt and its answer, without visual tokens."""

MAX_PROMPT_LETTERS = 600
"""A conversation whose prompt would be longer ends; answers can have more bytes than letters."""

_WORDS = ("what", "where", "is", "the", "this", "many", "small", "red", "thing", "of", "picture")
_SYSTEMS = ("", "Answer briefly. ", "You look closely, and then you answer in one word. " * 3)


class Traffic:
    """Requests with 0 to 4 of some images, given by their seeds; 4 in 10 go on with another.

    If there are videos, 4 in 10 of the new requests have one, and at most one image.

    The seed decides everything, so that a failure can be repeated.
    """

    def __init__(self, seed: int, images: Sequence[int], videos: Sequence[int] = ()) -> None:
        self.rng = Random(seed)
        self.images = images
        self.videos = videos
        self._finished: list[tuple[RequestSpec, str]] = []

    def finished(self, spec: RequestSpec, answer: str) -> None:
        """Add a conversation that may go on."""
        self._finished.append((spec, answer))
        del self._finished[:-40]

    def _text(self) -> str:
        most = self.rng.choice((3, 12, 40))
        return " ".join(self.rng.choice(_WORDS) for _ in range(self.rng.randint(1, most)))

    def next(self) -> RequestSpec:
        rng = self.rng
        new = RequestSpec(
            "",
            max_tokens=rng.randint(1, rng.choice((1, 4, 12, 40))),
            cache_salt=rng.choice((None,) * 12 + ("a", "b")),
            priority=rng.randint(0, 3),
        )
        if self._finished and rng.random() < 0.4:
            spec, answer = rng.choice(self._finished)
            text = f"{spec.text} ASSISTANT:{answer} USER: {self._text()}"
            if len(spec.system + text) + 8 * len(spec.images) < MAX_PROMPT_LETTERS:
                return replace(
                    spec,
                    text=text,
                    max_tokens=new.max_tokens,
                    cache_salt=new.cache_salt,
                    priority=new.priority,
                )
        if self.videos and rng.random() < 0.4:
            images = tuple(rng.choice(self.images) for _ in range(rng.randint(0, 1)))
            new = replace(
                new,
                videos=(rng.choice(self.videos),),
                images=images,
                order="".join(rng.sample("vi" if images else "v", 1 + len(images))),
                ratio=rng.choice(RATIOS),
            )
            return replace(new, system=rng.choice(_SYSTEMS), text=self._text())
        images = tuple(rng.choice(self.images) for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4))))
        return replace(
            new,
            images=images,
            system=rng.choice(_SYSTEMS),
            text=self._text(),
            ratio=rng.choice(RATIOS) if images else None,
        )
