"""Asks a server an exam's questions, through OpenAI's client."""

import asyncio
import base64
import mimetypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import openai

from evaluation.exam import Example, ImageFile, read_image
from evaluation.scoring import Scorer
from vitcop_vllm.pruning.settings import RATIO_HEADER

NO_RATIO = "none"


@dataclass(frozen=True)
class Ratio:
    """A pruning ratio to ask for.

    Attributes:
        label: As people write it: "8/9", "0.889", or "none" for no header at all.
        value: In [0, 1); None sends no header, so that the server's own default holds.
    """

    label: str
    value: Fraction | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a fraction, a decimal number or "none".

        Raises:
            ValueError: If it is neither, or outside [0, 1).
        """
        text = text.strip()
        if text == NO_RATIO:
            return cls(NO_RATIO, None)
        try:
            value = Fraction(text)
        except (ValueError, ZeroDivisionError):
            value = Fraction(-1)
        if not 0 <= value < 1:
            raise ValueError(
                f"a ratio is a fraction or decimal number from 0 to below 1, or {NO_RATIO!r}; "
                f"got {text!r}"
            )
        return cls(str(value) if "/" in text or value == 0 else text, value)

    @property
    def decimal(self) -> str | None:
        """What the header says: plain decimal, as the server wants it."""
        if self.value is None:
            return None
        return f"{float(self.value):.12f}".rstrip("0").rstrip(".")


UNPRUNED = Ratio("0", Fraction(0))


@dataclass(frozen=True)
class Reply:
    """One answer of the server.

    Attributes:
        score: Of this turn, from 0 to 1.
        seconds: From sending the request to having the whole answer.
        ratio: Share of visual tokens removed, as the server reports it; None if it does not.
        encoder: Visual tokens from the encoder, as reported.
        stages: Visual tokens kept in each stage, as reported.
    """

    text: str
    score: float
    seconds: float
    ratio: float | None
    encoder: int | None
    stages: tuple[int, ...] | None


@dataclass(frozen=True)
class Outcome:
    """What asking one example came to.

    Attributes:
        replies: To each turn; empty if asking failed.
        error: What went wrong, else None.
        refused: Whether it is the pruning ratio that the server refused.
    """

    replies: tuple[Reply, ...] = ()
    error: str | None = None
    refused: bool = False


class RatioRefusedError(Exception):
    """The server does not go as far as the ratio asked for; says why in its own words."""


class NotPrunedError(Exception):
    """The server took a ratio and reports no pruning: it does not know what was asked."""


class Examiner:
    """Asks one model on one server.

    What a repetition may mend (timeouts, 429, 5xx, lost connections) OpenAI's client repeats
    twice; a refusal it does not.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, model: str, scorer: Scorer, max_tokens: int
    ) -> None:
        self._client = client
        self._model = model
        self._scorer = scorer
        self._max_tokens = max_tokens

    async def ask_all(
        self,
        examples: Sequence[Example],
        ratio: Ratio,
        concurrency: int,
        on_answer: Callable[[], object],
    ) -> list[Outcome]:
        """Ask every example, ``concurrency`` of them at a time.

        Args:
            on_answer: Called after each example.

        Raises:
            RatioRefusedError: If the server refuses the ratio; found out with one example.
        """
        free = asyncio.Semaphore(concurrency)

        async def ask(example: Example) -> Outcome:
            async with free:
                outcome = await self._outcome(example, ratio)
                on_answer()
                return outcome

        first = await ask(examples[0])
        if first.refused:
            raise RatioRefusedError(first.error)
        return [first, *await asyncio.gather(*map(ask, examples[1:]))]

    async def _outcome(self, example: Example, ratio: Ratio) -> Outcome:
        try:
            return Outcome(replies=tuple(await self._converse(example, ratio)))
        except openai.BadRequestError as error:
            return Outcome(error=sentence(error), refused=error.param == RATIO_HEADER)
        except (openai.OpenAIError, NotPrunedError, OSError) as error:
            return Outcome(error=sentence(error))

    async def _converse(self, example: Example, ratio: Ratio) -> list[Reply]:
        """Ask turn after turn; the model sees its own earlier answers, right or wrong."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in example.images
        ]
        messages: list[Any] = []
        replies: list[Reply] = []
        for turn in example.turns:
            content.append({"type": "text", "text": turn.question})
            messages.append({"role": "user", "content": content})
            content = []
            start = time.perf_counter()
            answer = await self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=0,
                max_tokens=self._max_tokens,
                extra_headers={} if ratio.decimal is None else {RATIO_HEADER: ratio.decimal},
            )
            seconds = time.perf_counter() - start
            text = answer.choices[0].message.content or ""
            score = self._scorer(text, turn.answers)
            replies.append(Reply(text, score, seconds, *reported_pruning(answer.usage, ratio)))
            messages.append({"role": "assistant", "content": text})
        return replies


def reported_pruning(
    usage: Any, ratio: Ratio
) -> tuple[float | None, int | None, tuple[int, ...] | None]:
    """Effective ratio, encoder tokens and tokens per stage from an answer's usage.

    Raises:
        NotPrunedError: If a ratio was sent and there is none of it. Servers drop headers they do
            not know, and every ratio would look as good as 0.
    """
    tokens = getattr(usage, "visual_tokens", None)
    if tokens is not None:
        return usage.pruning_ratio, tokens["encoder"], tuple(tokens["stages"])
    if ratio.value is not None:
        raise NotPrunedError(
            f"the server answered, but its usage says nothing of visual_tokens: it does not know "
            f"{RATIO_HEADER}; ask with --ratios {NO_RATIO}"
        )
    return None, None, None


def data_url(image: ImageFile) -> str:
    """The encoded image as an URL that carries it."""
    kind = mimetypes.guess_type(image)[0] if isinstance(image, Path) else None
    return f"data:{kind or 'image/png'};base64,{base64.b64encode(read_image(image)).decode()}"


def sentence(error: Exception) -> str:
    """What went wrong, in the server's own words where it has some."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error or type(error).__name__)
