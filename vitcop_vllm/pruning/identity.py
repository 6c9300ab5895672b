"""The counts of a picture travel in its identity.

vLLM names a processed picture by a hash: key of the processor cache, of the encoder
cache and of every KV block the picture touches. We end that name with the picture's
counts. So each process that sees a request knows its plan, from data vLLM never strips,
and two ratios of one picture can never be taken for each other.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"

EXPLAIN_KEY = "explain_as"
"""Processor keyword: a name, given to no other request, under which choices are told."""

MOST_EXPLAINED = 256
"""Explanations that wait in a worker to be asked for; some 10 kB each."""

_EXPLAINED = re.compile(r"explain:[^:]*:[0-9]+:([0-9]+)x([0-9]+):")


class Placeholders(Protocol):
    """Where a picture's tokens stand in the prompt: vLLM's ``PlaceholderRange``."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...


class Feature(Protocol):
    """A picture of a request: vLLM's ``MultiModalFeatureSpec``."""

    @property
    def identifier(self) -> str: ...

    @property
    def mm_position(self) -> Placeholders: ...


def tag_identifier(mm_hash: str, counts: VisualTokenCounts) -> str:
    """A picture's hash with its counts at the end."""
    return f"{mm_hash}{_SEPARATOR}{counts.encode()}"


def explained_identifier(request: str, number: int, size: tuple[int, int], mm_hash: str) -> str:
    """A name that no other picture has, so that nothing known of the picture is reused.

    Args:
        request: Value of ``EXPLAIN_KEY``.
        number: The picture's in the request.
        size: Width and height in pixels, as it was sent.
        mm_hash: Its hash, with or without counts.
    """
    width, height = size
    return f"explain:{request}:{number}:{width}x{height}:{mm_hash}"


def explained_size(identifier: str) -> tuple[int, int] | None:
    """Width and height of a picture whose choices are to be told; ``None`` for all others."""
    found = _EXPLAINED.match(identifier)
    return (int(found[1]), int(found[2])) if found else None


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts a picture's identity ends with.

    Whatever a client chose as the picture's ``uuid`` stands before the last separator.

    Raises:
        RuntimeError: If there are none: the picture passed another processor than ours.
    """
    try:
        return VisualTokenCounts.decode(identifier.rpartition(_SEPARATOR)[2])
    except ValueError as error:
        raise RuntimeError(
            f"picture {identifier!r} was processed without visual token counts"
        ) from error


def _counts_of_feature(feature: Feature) -> VisualTokenCounts:
    """Counts that fit the prompt: those told, or all tokens of a picture not processed by us.

    Engines also take prompts that were processed elsewhere. An error here would stop them
    for every request; such a picture simply has as many tokens as placeholders.
    """
    length = feature.mm_position.length
    try:
        counts = counts_of_identifier(feature.identifier)
    except RuntimeError:
        return VisualTokenCounts.unpruned(length)
    return counts if counts.stages[0] == length else VisualTokenCounts.unpruned(length)


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these pictures; ``None`` where nothing is pruned."""
    plan = RequestPlan(
        tuple(
            VisualSpan(feature.mm_position.offset, _counts_of_feature(feature))
            for feature in features
        )
    )
    return plan if plan.is_pruned else None
