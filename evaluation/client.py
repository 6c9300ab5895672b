"""Asks a server an exam's questions, through OpenAI's client."""

import asyncio
import base64
import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import openai

from evaluation.exam import Example
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
class Usage:
    """What a server reports of a request's visual tokens.

    Attributes:
        ratio: Share of visual tokens removed, averaged over layers.
        encoder: Visual tokens from the encoder.
        stages: Visual tokens kept in each stage.
    """

    ratio: float
    encoder: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """The answer to one turn; ``usage`` is None if the server reports none."""

    text: str
    is_right: bool
    usage: Usage | None


Outcome = list[Reply] | str
"""Replies to each turn of an example, or the error."""


class RatioRefusedError(Exception):
    """The server refuses the pruning ratio; has the server's own words."""


class NotPrunedError(Exception):
    """The server answered a request with a ratio, but reports no pruning."""


@dataclass(frozen=True)
class Examiner:
    """Asks one model on one server.

    OpenAI's client repeats a request twice after timeouts, 429, 5xx and lost connections.
    """

    client: openai.AsyncOpenAI
    model: str
    scorer: Scorer
    max_tokens: int

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
            RatioRefusedError: If the server refuses the ratio of the first example.
        """
        free = asyncio.Semaphore(concurrency)

        async def ask(example: Example) -> Outcome:
            async with free:
                outcome: Outcome
                try:
                    outcome = await self._converse(example, ratio)
                except (openai.OpenAIError, NotPrunedError, OSError) as error:
                    if example is examples[0] and getattr(error, "param", None) == RATIO_HEADER:
                        raise RatioRefusedError(sentence(error)) from None
                    outcome = sentence(error)
                on_answer()
                return outcome

        first = await ask(examples[0])
        return [first, *await asyncio.gather(*map(ask, examples[1:]))]

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
            answer = await self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=0,
                max_tokens=self.max_tokens,
                extra_headers={} if ratio.decimal is None else {RATIO_HEADER: ratio.decimal},
            )
            text = answer.choices[0].message.content or ""
            usage = reported_usage(answer.usage, ratio)
            replies.append(Reply(text, self.scorer(text, turn.answers), usage))
            messages.append({"role": "assistant", "content": text})
        return replies


def reported_usage(usage: Any, ratio: Ratio) -> Usage | None:
    """What an answer's ``usage`` reports of visual tokens.

    Raises:
        NotPrunedError: If a ratio was sent and nothing is reported. Servers drop headers that
            they do not know, and every ratio would look as good as 0.
    """
    tokens = getattr(usage, "visual_tokens", None)
    if tokens is not None:
        return Usage(usage.pruning_ratio, tokens["encoder"], tuple(tokens["stages"]))
    if ratio.value is not None:
        raise NotPrunedError(
            f"the server answered, but its usage has no visual_tokens: it does not know "
            f"{RATIO_HEADER}; ask with --ratios {NO_RATIO}"
        )
    return None


def data_url(image: Path) -> str:
    """An encoded image as a URL that contains it."""
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def sentence(error: Exception) -> str:
    """What went wrong, in the server's own words where it has some."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error or type(error).__name__)
