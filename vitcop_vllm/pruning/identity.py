"""An image's identifier ends with its counts.

vLLM identifies a processed image by a hash, which is its key in the processor cache, in the
encoder cache and in the hashes of KV blocks. Ours appends the image's counts. vLLM never strips an
identifier, so each process that sees a request knows its plan. Two ratios of one image with
different counts have different keys everywhere.

A video's identifier ends with the counts of a frame and the number of frames that have them, as in
``hash@countsx8``. If the first frame has other counts, these come first: ``hash@counts+countsx7``.
If tokens that belong to no frame follow the last frame, their number ends the identifier:
``hash@countsx8+1``.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple, Protocol

from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts

_SEPARATOR = "@"

_COUNTS = r"([0-9]+(?:\.[0-9]+){4})"

_TAG = re.compile(rf"(?:{_COUNTS}\+)?{_COUNTS}(?:x([0-9]+)(?:\+([0-9]+))?)?")
"""Form of the end of an identifier: counts of a video's first frame, if they differ; counts of an
image or of each other frame; how many frames have them; tokens after the last frame, if there are
any. See :meth:`VisualTokenCounts.encode`."""

EXPLAIN_KEY = "explain_as"
"""Processor keyword: a unique request id under which selections are recorded."""

MOST_EXPLAINED = 256
"""Records that a worker keeps until the server takes them, one per image and per frame of a video:
some 10 kB for an image of 576 tokens, hundreds of kB for one of 16,384."""

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


def tag_identifier(
    mm_hash: str,
    counts: VisualTokenCounts,
    num_frames: int | None = None,
    first: VisualTokenCounts | None = None,
    tail: int = 0,
) -> str:
    """A hash with counts at the end.

    Args:
        mm_hash: Hash of the image or video.
        counts: Of the image, or of each frame of the video.
        num_frames: Number of the video's frames; ``None`` for an image.
        first: Counts of the video's first frame, if they differ from those of the others.
        tail: Visual tokens after the video's last frame, which belong to no frame.
    """
    if num_frames is None:
        return f"{mm_hash}{_SEPARATOR}{counts.encode()}"
    after = f"+{tail}" if tail else ""
    if first is None:
        return f"{mm_hash}{_SEPARATOR}{counts.encode()}x{num_frames}{after}"
    return f"{mm_hash}{_SEPARATOR}{first.encode()}+{counts.encode()}x{num_frames - 1}{after}"


def explained_identifier(request: str, number: int, size: tuple[int, int], mm_hash: str) -> str:
    """A unique name of an image or a video, under which its selections are recorded.

    No cache knows the name, so the encoder and all layers run on it again.

    Args:
        request: Value of ``EXPLAIN_KEY``.
        number: Index in the request: of its images, then of its videos.
        size: Width and height as it was sent, in pixels.
        mm_hash: Hash of the image or video, with or without counts.
    """
    width, height = size
    return f"explain:{request}:{number}:{width}x{height}:{mm_hash}"


def frame_names(identifier: str, num_frames: int) -> list[str]:
    """Names of a video's frames, under which their selections are recorded."""
    return [f"{identifier}#{number}" for number in range(num_frames)]


def record_names(identifier: str) -> list[str]:
    """Names under which the selections of an image, or of each frame of a video, are recorded."""
    num_frames = frames_of_identifier(identifier)
    return [identifier] if num_frames is None else frame_names(identifier, num_frames)


def span_names(identifier: str) -> list[str]:
    """Names of the records of an image's or a video's spans; see :func:`spans_in_prompt`.

    The span of the tokens after a video's last frame has no record, so its name is empty.
    """
    tag = _find_tag(identifier)
    has_tail = tag is not None and tag.tail is not None
    return [*record_names(identifier), *([""] if has_tail else [])]


def explained_size(identifier: str) -> tuple[int, int] | None:
    """Width and height of an image or video that is to be explained; ``None`` for all others."""
    found = _EXPLAINED.match(identifier)
    return (int(found[1]), int(found[2])) if found else None


class _Tag(NamedTuple):
    """What stands at the end of an identifier, as text; see ``_TAG``."""

    first: str | None
    counts: str
    others: str | None
    tail: str | None

    @property
    def num_frames(self) -> int | None:
        """Number of a video's frames; ``None`` for an image."""
        return None if self.others is None else int(self.others) + (self.first is not None)

    def by_frame(self) -> Iterator[VisualTokenCounts]:
        """Counts of the image, or of each frame in turn.

        Raises:
            ValueError: If the counts are impossible.
        """
        counts = VisualTokenCounts.decode(self.counts)
        if self.first is not None:
            yield VisualTokenCounts.decode(self.first)
        yield from repeat(counts, 1 if self.others is None else int(self.others))


def _find_tag(identifier: str) -> _Tag | None:
    """The end of an identifier; ``None`` if another processor than ours made the identifier.

    A ``uuid`` that a client chose stands before the last separator.
    """
    _, separator, tag = identifier.rpartition(_SEPARATOR)
    found = _TAG.fullmatch(tag) if separator else None
    return None if found is None else _Tag(*found.groups())


def counts_by_frame(identifier: str) -> list[VisualTokenCounts]:
    """The counts at the end of an identifier: of an image, or of each frame of a video.

    Raises:
        RuntimeError: If there are none, because another processor than ours made the identifier.
    """
    tag = _find_tag(identifier)
    if tag is None:
        raise RuntimeError(f"image {identifier!r} was processed without visual token counts")
    return [*tag.by_frame()]


def counts_of_identifier(identifier: str) -> VisualTokenCounts:
    """The counts at the end of an image's identifier, or of a video's last frame.

    Raises:
        RuntimeError: If there are none; see :func:`counts_by_frame`.
    """
    return counts_by_frame(identifier)[-1]


def frames_of_identifier(identifier: str) -> int | None:
    """Number of frames of the video with this identifier; ``None`` for an image."""
    tag = _find_tag(identifier)
    return None if tag is None else tag.num_frames


class CountsMismatchError(RuntimeError):
    """An identifier ends with counts that contradict the placeholders of its image or video.

    The fault is ours, or that of another processor. Tokens would be dropped at wrong positions,
    so the request must fail; other requests are not affected.
    """


def spans_in_prompt(identifier: str, place: Placeholders) -> tuple[VisualSpan, ...]:
    """Visual tokens of an image, or of each part of a video, with the identifier's counts.

    An engine also accepts prompts from another processor, whose identifiers do not end with
    counts. Such an image is not pruned. An unpruned image may have text between its visual
    tokens, which its span then includes.

    Frames may lie next to each other or have text between them. A run of visual tokens is divided
    into frames by their counts. Tokens after the last frame are a span of their own, which is not
    pruned.

    Raises:
        CountsMismatchError: If the identifier ends with counts, and they are impossible or
            contradict the number of consecutive placeholders.
    """
    runs = place.extract_embeds_range()
    offset, length = runs[0][0], runs[-1][1] + 1 - runs[0][0]
    tag = _find_tag(identifier)
    if tag is None:
        return (VisualSpan(offset, VisualTokenCounts.unpruned(length)),)
    item = f"{'image' if tag.others is None else 'video'} ...{identifier[-48:]!r}"
    try:
        counts = VisualTokenCounts.decode(tag.counts)
        first = counts if tag.first is None else VisualTokenCounts.decode(tag.first)
        num_frames = tag.num_frames
    except ValueError as error:
        raise CountsMismatchError(f"{item}: {error}") from None
    n1 = counts.stages[0]
    keeps = f"{item} keeps {n1} visual tokens in Stage I by its identifier"
    num_visual = sum(last + 1 - begin for begin, last in runs)
    if num_frames is None:
        if n1 != num_visual:
            raise CountsMismatchError(f"{keeps}, and has {num_visual} placeholders in the prompt")
        if length == n1:
            return (VisualSpan(offset, counts),)
        if counts.is_pruned:
            raise CountsMismatchError(f"{item} is pruned, and has text between its placeholders")
        return (VisualSpan(offset, VisualTokenCounts.unpruned(length)),)
    tail = int(tag.tail or 0)
    spans = _spans_of_frames(runs, num_frames, first, counts, tail)
    if spans is None:
        of_first = "" if tag.first is None else f", {first.stages[0]} of the first"
        after = f" and {tail} after them" if tail else ""
        raise CountsMismatchError(
            f"{keeps} of each of {num_frames} frames{of_first}{after}, and has runs of "
            f"{sorted({last + 1 - begin for begin, last in runs})} placeholders in the prompt, "
            f"{num_visual} in all"
        )
    return spans


def _spans_of_frames(
    runs: Sequence[tuple[int, int]],
    num_frames: int,
    first: VisualTokenCounts,
    others: VisualTokenCounts,
    tail: int,
) -> tuple[VisualSpan, ...] | None:
    """Spans of a video's frames and tail; ``None`` if its runs of visual tokens are not these.

    Args:
        runs: First and last position of each run.
        num_frames: Number of frames.
        first: Counts of the first frame.
        others: Counts of each other frame.
        tail: Visual tokens after the last frame.
    """
    kept = first.stages[0] + others.stages[0] * (num_frames - 1)
    of_video = others.encoder * num_frames + tail, kept + tail
    if sum(last + 1 - begin for begin, last in runs) != of_video[1]:
        return None
    after = [VisualTokenCounts.unpruned(tail)] if tail else []
    parts = chain([first], repeat(others, num_frames - 1), after)
    spans: list[VisualSpan] = []
    for begin, last in runs:
        while begin <= last:
            spans.append(VisualSpan(begin, next(parts), of_video))
            begin = spans[-1].end
        if begin != last + 1:
            return None
    return tuple(spans)


def plan_request(features: Iterable[Feature]) -> RequestPlan | None:
    """Plan of a request with these images and videos; ``None`` if none is pruned.

    Raises:
        CountsMismatchError: See :func:`spans_in_prompt`.
    """
    spans = (spans_in_prompt(feature.identifier, feature.mm_position) for feature in features)
    plan = RequestPlan(tuple(chain.from_iterable(spans)))
    return plan if plan.is_pruned else None
