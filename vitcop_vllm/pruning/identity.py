"""An image's identifier ends with its counts.

vLLM identifies a processed image by a hash, which is its key in the processor cache, in the
encoder cache and in the hashes of KV blocks. Ours appends the image's counts. vLLM never strips an
identifier, so each process that sees a request knows its plan. Two ratios of one image with
different counts have different keys everywhere.

A video's identifier ends with the counts of one frame, which all its frames have, and the number
of frames.
"""

import re
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple, Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"

_TAG = re.compile(r"([0-9]+(?:\.[0-9]+){4})(?:x([0-9]+))?")
"""Form of the end of an identifier: counts, and a video's number of frames. See
:meth:`VisualTokenCounts.encode`."""

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
    """An image or video of a request: vLLM's ``MultiModalFeatureSpec``."""

    @property
    def identifier(self) -> str: ...

    @property
    def mm_position(self) -> Placeholders: ...


def tag_identifier(mm_hash: str, counts: VisualTokenCounts, num_frames: int | None = None) -> str:
    """A hash with counts at the end.

    Args:
        mm_hash: Hash of the image or video.
        counts: Of the image, or of one frame of the video.
        num_frames: Number of the video's frames; ``None`` for an image.
    """
    frames = "" if num_frames is None else f"x{num_frames}"
    return f"{mm_hash}{_SEPARATOR}{counts.encode()}{frames}"


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


class _Tag(NamedTuple):
    """What stands at the end of an identifier, as text."""

    counts: str
    num_frames: str | None


def _find_tag(identifier: str) -> _Tag | None:
    """The end of an identifier; ``None`` if another processor than ours made the identifier.

    A ``uuid`` that a client chose stands before the last separator.
    """
    _, separator, tag = identifier.rpartition(_SEPARATOR)
    found = _TAG.fullmatch(tag) if separator else None
    return None if found is None else _Tag(found[1], found[2])


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts at the end of an identifier: of an image, or of each frame of a video.

    Raises:
        RuntimeError: If there are none, because another processor than ours made the identifier.
    """
    tag = _find_tag(identifier)
    if tag is None:
        raise RuntimeError(f"image {identifier!r} was processed without visual token counts")
    return VisualTokenCounts.decode(tag.counts)


def frames_of_identifier(identifier: str) -> int | None:
    """Number of frames of the video with this identifier; ``None`` for an image."""
    tag = _find_tag(identifier)
    return None if tag is None or tag.num_frames is None else int(tag.num_frames)


class CountsMismatchError(RuntimeError):
    """An identifier ends with counts that contradict the placeholders of its image or video.

    The fault is ours, or that of another processor. Tokens would be dropped at wrong positions,
    so the request must fail; other requests are not affected.
    """


def spans_in_prompt(identifier: str, place: Placeholders) -> tuple[VisualSpan, ...]:
    """Visual tokens of an image, or of each frame of a video, with the identifier's counts.

    An engine also accepts prompts from another processor, whose identifiers do not end with
    counts. Such an image is not pruned. An unpruned image may have text between its visual
    tokens, which its span then includes.

    Frames may lie next to each other or have text between them. All have equally many tokens, so
    a run of visual tokens is divided into frames of n1 tokens.

    Raises:
        CountsMismatchError: If the identifier ends with counts, and they are impossible or
            contradict the number of consecutive placeholders.
    """
    runs = place.extract_embeds_range()
    offset, length = runs[0][0], runs[-1][1] + 1 - runs[0][0]
    tag = _find_tag(identifier)
    if tag is None:
        return (VisualSpan(offset, VisualTokenCounts.unpruned(length)),)
    item = f"{'image' if tag.num_frames is None else 'video'} ...{identifier[-48:]!r}"
    try:
        counts = VisualTokenCounts.decode(tag.counts)
        num_frames = int(tag.num_frames or 1)
    except ValueError as error:
        raise CountsMismatchError(f"{item}: {error}") from None
    n1 = counts.stages[0]
    keeps = f"{item} keeps {n1} visual tokens in Stage I by its identifier"
    lengths = [last + 1 - first for first, last in runs]
    if tag.num_frames is None:
        if n1 != sum(lengths):
            raise CountsMismatchError(f"{keeps}, and has {sum(lengths)} placeholders in the prompt")
        if length == n1:
            return (VisualSpan(offset, counts),)
        if counts.is_pruned:
            raise CountsMismatchError(f"{item} is pruned, and has text between its placeholders")
        return (VisualSpan(offset, VisualTokenCounts.unpruned(length)),)
    if any(length % n1 for length in lengths) or sum(lengths) != n1 * num_frames:
        raise CountsMismatchError(
            f"{keeps} of each of {num_frames} frames, and has runs of "
            f"{sorted(set(lengths))} placeholders in the prompt, {sum(lengths)} in all"
        )
    return tuple(
        VisualSpan(first, counts, num_frames)
        for first_of_run, last in runs
        for first in range(first_of_run, last + 1, n1)
    )


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these images and videos; ``None`` if none is pruned.

    Raises:
        CountsMismatchError: See :func:`spans_in_prompt`.
    """
    spans = (spans_in_prompt(feature.identifier, feature.mm_position) for feature in features)
    plan = RequestPlan(tuple(chain.from_iterable(spans)))
    return plan if plan.is_pruned else None
