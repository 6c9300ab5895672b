"""Identifiers of images, which carry the images' visual token counts.

vLLM identifies a processed image by a hash. It is the key of the processor cache, of the encoder
cache and of every KV block with tokens of the image. We append the image's counts to the hash. So
every process that handles a request knows its plan, from data that vLLM always sends, and one image
at two ratios never shares a cache entry.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"

_TAG = re.compile(r"[0-9]+(\.[0-9]+){4}")
"""Format of the counts at the end of an identifier; see :meth:`VisualTokenCounts.encode`."""

EXPLAIN_KEY = "explain_as"
"""Processor keyword: unique request id under which the request's selections are recorded."""

MOST_EXPLAINED = 256
"""Maximum number of images whose explanations a worker keeps until they are fetched. An explanation
takes some 10 kB for an image of 576 tokens, and hundreds of kB for 16,384 tokens."""

_EXPLAINED = re.compile(r"explain:[^:]*:[0-9]+:([0-9]+)x([0-9]+):")


class Placeholders(Protocol):
    """Range of an image's tokens in the prompt: vLLM's ``PlaceholderRange``."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...


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
    """A unique identifier for an image to explain, so that no cache entry of the image is used.

    Args:
        request: Value of ``EXPLAIN_KEY``.
        number: Index of the image in the request.
        size: Width and height of the image as it was sent, in pixels.
        mm_hash: Hash of the image, with or without counts.
    """
    width, height = size
    return f"explain:{request}:{number}:{width}x{height}:{mm_hash}"


def explained_size(identifier: str) -> tuple[int, int] | None:
    """Width and height of an image to explain; ``None`` for other images."""
    found = _EXPLAINED.match(identifier)
    return (int(found[1]), int(found[2])) if found else None


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts at the end of an image's identifier.

    A ``uuid`` that the client chose may contain the separator; the counts follow the last one.

    Raises:
        RuntimeError: If the identifier has no counts, because our processor did not make it.
    """
    try:
        return VisualTokenCounts.decode(identifier.rpartition(_SEPARATOR)[2])
    except ValueError as error:
        raise RuntimeError(
            f"image {identifier!r} was processed without visual token counts: its processor was "
            "not the one of this plugin"
        ) from error


class CountsMismatchError(RuntimeError):
    """The counts in an image's identifier contradict its placeholders in the prompt.

    The fault is in our processor, or in the client that processed the prompt. Tokens would be
    dropped at wrong positions, so the request must fail. Other requests are not affected.
    """


def counts_in_prompt(identifier: str, num_placeholders: int) -> VisualTokenCounts:
    """Counts of an image that has ``num_placeholders`` tokens in the prompt.

    Engines also accept prompts that another processor made. Their identifiers do not end with
    counts. Such an image is unpruned and has one visual token per placeholder.

    Raises:
        CountsMismatchError: If the identifier ends with counts that are impossible, or whose n1
            is not ``num_placeholders``.
    """
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
            f"{image}: by its identifier, Stage I keeps {counts.stages[0]} visual tokens, but the "
            f"image has {num_placeholders} placeholders in the prompt"
        )
    return counts


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these images; ``None`` if no image is pruned.

    Raises:
        CountsMismatchError: See :func:`counts_in_prompt`.
    """
    places = [(feature.identifier, feature.mm_position) for feature in features]
    plan = RequestPlan(
        tuple(VisualSpan(at.offset, counts_in_prompt(name, at.length)) for name, at in places)
    )
    return plan if plan.is_pruned else None
