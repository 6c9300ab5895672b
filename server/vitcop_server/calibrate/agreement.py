"""Two measures of whether a pruned model agrees with itself unpruned. Neither needs right answers.

``exact``: it gives the same answer, character by character. Greedy answers break at the first tie,
so a long answer that only says *big* for *large* counts as a break.

``logprob``: the unpruned answer, token by token, is still likely. vLLM scores that answer under the
pruned model. It agrees if **every token keeps at least half of the probability that it has without
pruning** (``least``), and if the answer still ends where it ended. It is the worst token that
decides and not the mean, which a long answer would dilute: one wrong number in a sentence costs one
token nearly all of its probability, and the mean hardly anything. Other words that mean the same
cost little, because the unpruned model found both likely. For a short answer this measure is
stricter than ``exact`` in one way: it sees a model that becomes unsure before it answers otherwise.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

Measure = Literal["exact", "logprob"]


@dataclass(frozen=True)
class Reply:
    """An answer of the server.

    Attributes:
        text: The answer.
        finish: Why it ends, such as "stop" or "length".
        token_ids: Its tokens; empty if the server does not return them.
        prompt_tokens: Tokens of the prompt, pruned.
        pruning_ratio: Share of visual tokens dropped, averaged over layers, by the server's count.
        encoder: Visual tokens of the images, unpruned.
        seconds: From request to answer.
    """

    text: str
    finish: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    pruning_ratio: float
    encoder: int
    seconds: float

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "token_ids": tuple(value["token_ids"])})


@dataclass(frozen=True)
class Score:
    """The unpruned answer under the model at some ratio.

    Attributes:
        logprobs: Of each token of the answer, given all before. Empty if it was not scored.
        ends: Whether the model would end the answer there.
        text: The answer as it was sent: spaces around it may belong to the chat template.
    """

    logprobs: tuple[float, ...] = ()
    ends: bool = True
    text: str = ""

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "logprobs": tuple(value["logprobs"])})


def is_same(reply: Reply, baseline: Reply) -> bool:
    """The measure ``exact``."""
    return reply.text == baseline.text


def stays_likely(score: Score, baseline: Score, least: float) -> bool:
    """The measure ``logprob``.

    Args:
        score: The unpruned answer under the pruned model.
        baseline: The same under the unpruned model.
        least: Share of its probability that each token must keep.
    """
    pairs = zip(score.logprobs, baseline.logprobs, strict=True)
    likely = all(pruned - unpruned >= math.log(least) for pruned, unpruned in pairs)
    return likely and (score.ends or not baseline.ends)


@dataclass(frozen=True)
class Agreement:
    """How many of some images agree."""

    agreeing: int
    images: int

    @classmethod
    def of(cls, results: Iterable[tuple[object, bool]]) -> Self:
        """Count images of which all answers agree, from an image and a result for each answer.

        Answers about one image are not independent, so they do not count by themselves.
        """
        images: dict[object, bool] = {}
        for image, agrees in results:
            images[image] = images.get(image, True) and agrees
        return cls(sum(images.values()), len(images))

    @property
    def share(self) -> float:
        return self.agreeing / self.images
