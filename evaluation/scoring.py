"""Rules for right answers."""

import re
from collections.abc import Callable, Sequence

Scorer = Callable[[str, Sequence[str]], bool]
"""Whether an answer is right, from the answer and the accepted answers."""

# Without the signs that may belong to a number, as in "-5", ".5" and "$5".
_BEFORE = " \t\r\n\"'`([{*_“‘«¿¡"
_AFTER = " \t\r\n\"'`)]}*_”’».,;:!?…"


def normalise(text: str) -> str:
    """Remove case, and surrounding space and punctuation."""
    return text.casefold().lstrip(_BEFORE).rstrip(_AFTER)


def exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer is an accepted answer, after :func:`normalise`."""
    return normalise(answer) in map(normalise, accepted)


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer contains an accepted answer as whole words."""
    found = normalise(answer)
    return any(re.search(rf"(?<!\w){re.escape(normalise(one))}(?!\w)", found) for one in accepted)


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains}
