"""How right an answer is, from 0 to 1."""

import re
from collections.abc import Callable, Sequence

from evaluation.exam import ExamError, Example

Scorer = Callable[[str, Sequence[str]], float]
"""Takes the model's answer and every accepted one."""

# Signs that belong to a number ("-5", ".5", "$5") are not among them.
_BEFORE = " \t\r\n\"'`([{*_“‘«¿¡"
_AFTER = " \t\r\n\"'`)]}*_”’».,;:!?…"


def normalise(text: str) -> str:
    """Case, and the space and punctuation around a text, do not count."""
    return text.casefold().lstrip(_BEFORE).rstrip(_AFTER)


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones, after :func:`normalise`."""
    return float(normalise(answer) in map(normalise, accepted))


def contains(answer: str, accepted: Sequence[str]) -> float:
    """1 if an accepted answer stands in the answer, as whole words."""
    words = normalise(answer)
    return float(
        any(re.search(rf"(?<!\w){re.escape(normalise(one))}(?!\w)", words) for one in accepted)
    )


def vqa(answer: str, accepted: Sequence[str]) -> float:
    """VQA accuracy, min(matches / 3, 1), over the answers that (ten) people gave.

    The official program also drops articles and writes numbers as digits; this does not.
    """
    matches = sum(normalise(answer) == normalise(one) for one in accepted)
    return min(matches / 3, 1.0)


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains, "vqa": vqa}


def check_answers(examples: Sequence[Example], scorer: str) -> None:
    """Refuse an exam whose scores would mean nothing.

    Raises:
        ExamError: If an answer is nothing but punctuation, or, for ``vqa``, if a question has
            fewer than three answers.
    """
    for example in examples:
        for turn in example.turns:
            if not all(map(normalise, turn.answers)):
                raise ExamError(f"{turn.question!r} has an answer without any word or number")
            if scorer == "vqa" and len(turn.answers) < 3:
                raise ExamError(
                    "the scorer vqa needs at least three answers to each question; "
                    f"{turn.question!r} has {len(turn.answers)}"
                )
