"""An image's identifier ends with its counts.

vLLM identifies a processed image by a hash, which is its key in the processor cache, in the
encoder cache and in the hashes of KV blocks. Ours appends the image's counts. vLLM never strips an
identifier, so each process that sees a request knows its plan. Two ratios of one image with
different counts have different keys everywhere.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"

_TAG = re.compile(r"[0-9]+(\.[0-9]+){4}")
"""Form of the counts at the end of an identifier; see :meth:`VisualTokenCounts.encode`."""

EXPLAIN_KEY = "explain_as"
"""Processor keyword: a unique request id under which selections are recorded."""

MOST_EXPLAINED = 256
"""Records that a worker keeps until the server takes them: some 10 kB for an image of 576 tokens,
hundreds of kB for one of 16,384."""

_EXPLAINED = re.compile(r"explain:[^:]*:[0-9]+:([0-9]+)x([0-9]+):")


class Placeholders(Protocol):
    """Position of an image's tokens in the prompt: vLLM's ``PlaceholderRange``."""

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        """First and last position of each run of visual tokens; text may stand around a run."""


class Feature(Protocol):
    """An image of a request: vLLM's ``MultiModalFeatureSpec``."""

    @property
    def identifier(self) -> str: ...

    @property
    def mm_position(self) -> Placeholders: ...


def tag_identifier(mm_hash: str, counts: VisualTokenCounts) -> str:
    """An image's hash with its counts at the end."""
    return f"{mm_hash}{_SEPARATOR}{counts.encode()}"


def explained_identifier(request: str, number: int, size: tuple[int, int], mm_hash: str) -> str:
    """A unique name of an image, under which its selections are recorded.

    No cache knows the name, so the encoder and all layers run on the image again.

    Args:
        request: Value of ``EXPLAIN_KEY``.
        number: Index of the image in the request.
        size: Width and height of the image as it was sent, in pixels.
        mm_hash: Hash of the image, with or without counts.
    """
    width, height = size
    return f"explain:{request}:{number}:{width}x{height}:{mm_hash}"


def explained_size(identifier: str) -> tuple[int, int] | None:
    """Width and height of an image that is to be explained; ``None`` for all others."""
    found = _EXPLAINED.match(identifier)
    return (int(found[1]), int(found[2])) if found else None


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts at the end of an image's identifier.

    A ``uuid`` that a client chose stands before the last separator.

    Raises:
        RuntimeError: If there are none, because another processor than ours made the identifier.
    """
    try:
        return VisualTokenCounts.decode(identifier.rpartition(_SEPARATOR)[2])
    except ValueError as error:
        raise RuntimeError(
            f"image {identifier!r} was processed without visual token counts"
        ) from error


class CountsMismatchError(RuntimeError):
    """An image's identifier ends with counts that contradict its placeholders.

    The fault is ours, or that of another processor. Tokens would be dropped at wrong positions,
    so the request must fail; other requests are not affected.
    """


def span_in_prompt(identifier: str, place: Placeholders) -> VisualSpan:
    """Visual tokens of an image in the prompt, with the counts of its identifier.

    An engine also accepts prompts from another processor, whose identifiers do not end with
    counts. Such an image is not pruned. An unpruned image may have text between its visual
    tokens, which its span then includes.

    Raises:
        CountsMismatchError: If the identifier ends with counts, and they are impossible or
            their n1 is not the number of consecutive placeholders.
    """
    runs = place.extract_embeds_range()
    offset, length = runs[0][0], runs[-1][1] + 1 - runs[0][0]
    num_placeholders = sum(last + 1 - first for first, last in runs)
    counts = _checked_counts(identifier, num_placeholders)
    if num_placeholders == length:
        return VisualSpan(offset, counts)
    if counts.is_pruned:
        raise CountsMismatchError(
            f"image ...{identifier[-48:]!r} is pruned, and has text between its placeholders"
        )
    return VisualSpan(offset, VisualTokenCounts.unpruned(length))


def _checked_counts(identifier: str, num_placeholders: int) -> VisualTokenCounts:
    """Counts of an image that has ``num_placeholders`` tokens in the prompt."""
    _, separator, tag = identifier.rpartition(_SEPARATOR)
    if not separator or not _TAG.fullmatch(tag):
        return VisualTokenCounts.unpruned(num_placeholders)
    image = f"image ...{identifier[-48:]!r}"
    try:
        counts = VisualTokenCounts.decode(tag)
    except ValueError as error:
        raise CountsMismatchError(f"{image}: {error}") from None
    if counts.stages[0] != num_placeholders:
        raise CountsMismatchError(
            f"{image} keeps {counts.stages[0]} visual tokens in Stage I by its identifier, and "
            f"has {num_placeholders} placeholders in the prompt"
        )
    return counts


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these images; ``None`` if no image is pruned.

    Raises:
        CountsMismatchError: See :func:`span_in_prompt`.
    """
    places = [(feature.identifier, feature.mm_position) for feature in features]
    plan = RequestPlan(tuple(span_in_prompt(name, place) for name, place in places))
    return plan if plan.is_pruned else None
