"""Sends an exam's questions to a server with OpenAI's client."""

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
    """A requested pruning ratio.

    Attributes:
        label: "8/9", "0.889", or "none".
        value: In [0, 1); None sends no header, so that the server's default applies.
    """

    label: str
    value: Fraction | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a fraction, a decimal number or "none".

        Raises:
            ValueError: If ``text`` is none of these, or outside [0, 1).
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
        """The header's value, a plain decimal number."""
        if self.value is None:
            return None
        return f"{float(self.value):.12f}".rstrip("0").rstrip(".")


UNPRUNED = Ratio("0", Fraction(0))


@dataclass(frozen=True)
class Usage:
    """A request's visual tokens, reported by the server.

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
    """The server refuses the pruning ratio; holds the server's message."""


class NotPrunedError(Exception):
    """A ratio was sent, but the server's answer reports no pruning."""


@dataclass(frozen=True)
class Examiner:
    """Asks one model on one server.

    OpenAI's client retries twice after timeouts, 429, 5xx and lost connections.
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
        """Ask all examples, ``concurrency`` at a time.

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
                        raise RatioRefusedError(message_of(error)) from None
                    outcome = message_of(error)
                on_answer()
                return outcome

        first = await ask(examples[0])
        return [first, *await asyncio.gather(*map(ask, examples[1:]))]

    async def _converse(self, example: Example, ratio: Ratio) -> list[Reply]:
        """Ask turn after turn; the prompt holds the model's own earlier answers."""
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
    """The visual tokens in an answer's ``usage``.

    Raises:
        NotPrunedError: If a ratio was sent, but ``usage`` has no visual tokens. A server that
            ignores the header would make every ratio look as good as 0.
    """
    tokens = getattr(usage, "visual_tokens", None)
    if tokens is not None:
        return Usage(usage.pruning_ratio, tokens["encoder"], tuple(tokens["stages"]))
    if ratio.value is not None:
        raise NotPrunedError(
            f"the server's usage has no visual_tokens: the server ignores {RATIO_HEADER}; use "
            f"--ratios {NO_RATIO}"
        )
    return None


def data_url(image: Path) -> str:
    """An image file as a data URL."""
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"


def message_of(error: Exception) -> str:
    """The server's error message if it sent one, otherwise the exception's."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error or type(error).__name__)
