"""When an answer is right."""

import re
from collections.abc import Callable, Sequence

Scorer = Callable[[str, Sequence[str]], bool]
"""Whether an answer is right, from the answer and every accepted one."""

# Signs that belong to a number ("-5", ".5", "$5") are not among them.
_BEFORE = " \t\r\n\"'`([{*_“‘«¿¡"
_AFTER = " \t\r\n\"'`)]}*_”’».,;:!?…"


def normalise(text: str) -> str:
    """Without case, and without the space and punctuation around it."""
    return text.casefold().lstrip(_BEFORE).rstrip(_AFTER)


def exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is one of the accepted ones, after :func:`normalise`."""
    return normalise(answer) in map(normalise, accepted)


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer contains an accepted one as whole words."""
    found = normalise(answer)
    return any(re.search(rf"(?<!\w){re.escape(normalise(one))}(?!\w)", found) for one in accepted)


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains}
