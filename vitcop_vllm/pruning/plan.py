"""How many visual tokens each Stage keeps, and how many KV slots a prefix takes.

Arithmetic on the image's token count and the ratio. So processor, scheduler and worker know all
counts before a forward pass. *Which* tokens survive, ``selectors`` decide later, on the device.

Stage I selects tokens in the encoder, Stage II and III select them between decoder layers. A
*segment* is a run of decoder layers that compute the same tokens: Stage I selects the tokens of
segment 0, Stage II those of segment 1, Stage III those of segment 2.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Self

from vitcop_vllm.pruning.budgets import BudgetInputs
from vitcop_vllm.pruning.selectors import selector_of
from vitcop_vllm.pruning.settings import PruningSettings

STAGES = ("I", "II", "III")
"""Names of the Stages. Stage ``STAGES[s]`` selects the tokens of segment s."""

NUM_SEGMENTS = len(STAGES)

_LEAST_KEEP = 2.0**-53
"""Smallest keep fraction whose ratio is below 1 as a float."""


@dataclass(frozen=True)
class VisualTokenCounts:
    """Visual tokens of one image, or of one frame of a video: computed, and kept by each Stage.

    A *frame* of a video is what the encoder computes as one image. Qwen-VL's encoders join two
    frames of the file into one.

    Attributes:
        encoder: V, visual tokens the vision encoder computes.
        centres: K, cluster centres; 0 if nothing is pruned or clustered.
        stages: (n1, n2, n3), tokens that Stage I, II and III keep; n_s in segment s - 1.
    """

    encoder: int
    centres: int
    stages: tuple[int, int, int]

    def __post_init__(self) -> None:
        n1, n2, n3 = self.stages
        if not self.encoder >= n1 >= n2 >= n3 >= 1 or not 0 <= self.centres <= n1:
            raise ValueError(f"impossible visual token counts: {self}")

    @classmethod
    def unpruned(cls, encoder: int) -> Self:
        return cls(encoder, 0, (encoder, encoder, encoder))

    @property
    def is_pruned(self) -> bool:
        return self.stages[-1] < self.encoder

    @property
    def dropped(self) -> tuple[int, int, int]:
        """Prompt placeholders without a KV slot, per segment: n1 minus its tokens."""
        n1, n2, n3 = self.stages
        return 0, n1 - n2, n1 - n3

    def layer_average(self, boundaries: tuple[int, int], num_layers: int) -> float:
        """Visual tokens alive, averaged over the decoder's layers."""
        n1, n2, n3 = self.stages
        shallow, deep = boundaries
        total = shallow * n1 + (deep - shallow) * n2 + (num_layers - deep) * n3
        return total / num_layers

    def encode(self) -> str:
        """A short text, for the end of the image's identifier; see :meth:`decode`."""
        return ".".join(map(str, (self.encoder, self.centres, *self.stages)))

    @classmethod
    def decode(cls, text: str) -> Self:
        encoder, centres, n1, n2, n3 = map(int, text.split("."))
        return cls(encoder, centres, (n1, n2, n3))


@lru_cache(maxsize=4096)
def plan_counts(
    settings: PruningSettings,
    ratio: float,
    num_layers: int,
    encoder_tokens: int,
) -> VisualTokenCounts:
    """Counts for one image, by the budget rule of the settings' selector.

    For ViTCoP itself (arXiv 2601.17818), with keep fraction r = 1 - ratio, Stage I fraction
    v, boundaries S and D of L layers: n1 = int(v V),
    n2 = round((L r / v - S) / ((D - S) + (L - D) / 5) n1), n3 = round(n2 / 5). If that gives
    n2 > n1 (mild pruning), n2 = n1 and n3 is what the layer average leaves for the deep layers.

    Args:
        settings: The operator's settings.
        ratio: Share of visual tokens removed, averaged over layers, in [0, 1).
        num_layers: L, decoder layers.
        encoder_tokens: V, the image's visual tokens from the encoder.

    Raises:
        ValueError: If the ratio is outside [0, 1) or past what the selector can reach, or V is
            not positive.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"pruning ratio {ratio} is outside [0, 1)")
    if encoder_tokens < 1:
        raise ValueError(f"an image has at least one visual token, got {encoder_tokens}")
    if ratio == 0.0:
        return VisualTokenCounts.unpruned(encoder_tokens)
    boundaries = settings.boundaries(num_layers)
    selector = selector_of(settings.selector)
    if ratio > selector.max_ratio(boundaries, num_layers):
        raise ValueError(f"selector {settings.selector!r} cannot reach pruning ratio {ratio}")
    keep = 1.0 - ratio
    centres, stages = selector.budget(
        settings, BudgetInputs(keep, encoder_tokens, num_layers, *boundaries)
    )
    if stages[-1] == encoder_tokens:
        return VisualTokenCounts.unpruned(encoder_tokens)
    return VisualTokenCounts(encoder_tokens, centres, stages)


class VideoCounts(NamedTuple):
    """Counts of a video.

    Attributes:
        first: Of its first frame.
        others: Of each other frame.
    """

    first: VisualTokenCounts
    others: VisualTokenCounts


def plan_video(
    settings: PruningSettings, ratio: float, num_layers: int, frame_tokens: int, num_frames: int
) -> VideoCounts:
    """Counts for a video, whose frames together remove the ratio.

    Every frame gets the counts of an image, unless frames are compared (``compare_frames``). Then
    the first frame, of which nothing was shown before, keeps twice as much as an image: of two
    frames one and a half times, and never all tokens, so that all frames of a video are pruned or
    none. The other frames share what is left, at least half as much each as an image.

    A frame's counts are rounded like an image's.

    Args:
        settings: The operator's settings.
        ratio: Share of visual tokens removed, averaged over layers and frames, in [0, 1).
        num_layers: L, decoder layers.
        frame_tokens: V, a frame's visual tokens from the encoder.
        num_frames: F, at least 1.

    Raises:
        ValueError: See :func:`plan_counts`.
    """
    image = plan_counts(settings, ratio, num_layers, frame_tokens)
    keep = 1.0 - ratio
    first = min(keep * min(2.0, (num_frames + 1) / 2), 1.0 - 1.0 / frame_tokens)
    if not settings.compare_frames or not image.is_pruned or first <= keep:
        return VideoCounts(image, image)
    others = (num_frames * keep - first) / (num_frames - 1)
    return VideoCounts(
        plan_counts(settings, 1.0 - first, num_layers, frame_tokens),
        plan_counts(settings, 1.0 - max(others, _LEAST_KEEP), num_layers, frame_tokens),
    )


def why_uncacheable(settings: PruningSettings) -> str | None:
    """Why no request may reuse a prefix computed with these settings; ``None`` if it may."""
    if selector_of(settings.selector).reads_question:
        return (
            f"selector {settings.selector} reads the question, so what survives of an image "
            "is good for one prompt only"
        )
    if settings.positions == "reference":
        return (
            "positions: reference numbers an answer's tokens differently once they are part of "
            "the next prompt; set positions: original"
        )
    return None


def dummy_ratio(settings: PruningSettings, num_layers: int) -> float:
    """The pruning ratio of warm-ups and memory profiling; 0 if no ratio above 0 is allowed.

    It is mild: all three Stages drop, Stage II merges tokens, and many tokens are left.
    """
    reach = selector_of(settings.selector).max_ratio(settings.boundaries(num_layers), num_layers)
    return min(0.5, settings.max_pruning_ratio, reach)


def effective_ratio(
    counts: Iterable[VisualTokenCounts], boundaries: tuple[int, int], num_layers: int
) -> float | None:
    """Share of visual tokens removed, averaged over layers and images.

    ``None`` for a request without images.
    """
    encoder = kept = 0.0
    for one in counts:
        encoder += one.encoder
        kept += one.layer_average(boundaries, num_layers)
    return 1.0 - kept / encoder if encoder else None


@dataclass(frozen=True)
class VisualSpan:
    """Placeholders of an image or a frame in a prompt: ``stages[0]`` tokens from ``offset``.

    Tokens of a video that belong to no frame are a span that is not pruned.

    Attributes:
        video: V and n1, summed over the spans of the video that the frame belongs to; ``None``
            for an image. vLLM's encoder cache holds a video's tokens together.
    """

    offset: int
    counts: VisualTokenCounts
    video: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        return self.offset + self.counts.stages[0]

    @property
    def item(self) -> tuple[int, int]:
        """V and n1 of the image, or of the whole video."""
        return self.video or (self.counts.encoder, self.counts.stages[0])


@dataclass(frozen=True)
class RequestPlan:
    """All visual spans of one request, in prompt order.

    The *physical* length of a prefix in a segment is the number of its KV slots there: dropped
    visual tokens take none.
    """

    spans: tuple[VisualSpan, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [span.end for span in self.spans]

    @cached_property
    def _dropped(self) -> list[tuple[int, int, int]]:
        """Tokens dropped per segment by the first k spans, for k = 0..len(spans)."""
        sums = [(0, 0, 0)]
        for span in self.spans:
            a, b, c = sums[-1]
            x, y, z = span.counts.dropped
            sums.append((a + x, b + y, c + z))
        return sums

    @cached_property
    def is_pruned(self) -> bool:
        """Whether any image of the request is pruned, in the encoder or after."""
        return any(span.counts.is_pruned for span in self.spans)

    @cached_property
    def drops_slots(self) -> bool:
        """Whether any segment holds fewer KV slots than the prompt has tokens."""
        return any(self._dropped[-1])

    @cached_property
    def patches_per_placeholder(self) -> tuple[int, int]:
        """V and n1 of the image or video that Stage I prunes most, over all its frames."""
        return max((span.item for span in self.spans), key=lambda item: item[0] / item[1])

    @cached_property
    def largest_item(self) -> int:
        """n1 of the image or video that keeps most tokens in Stage I, over all its frames."""
        return max(span.item[1] for span in self.spans)

    def dropped_tokens(self, num_tokens: int) -> tuple[int, int, int]:
        """Tokens without a slot, per segment, among the first ``num_tokens``.

        A span counts only if all of it is among them: no step computes part of a pruned span.
        """
        return self._dropped[bisect_right(self._ends, num_tokens)]

    def num_slots(self, num_tokens: int, segment: int) -> int:
        """KV slots that the first ``num_tokens`` tokens take in ``segment``."""
        return num_tokens - self.dropped_tokens(num_tokens)[segment]

    def spans_in(self, start: int, end: int) -> tuple[VisualSpan, ...]:
        """Spans that begin in [start, end)."""
        return tuple(span for span in self.spans if start <= span.offset < end)

    @cached_property
    def _pruned(self) -> list[VisualSpan]:
        return [span for span in self.spans if span.counts.is_pruned]

    @cached_property
    def _pruned_ends(self) -> list[int]:
        return [span.end for span in self._pruned]

    def _next_pruned(self, after: int) -> VisualSpan | None:
        """The first pruned span that ends past ``after``."""
        index = bisect_right(self._pruned_ends, after)
        return self._pruned[index] if index < len(self._pruned) else None

    def cuts_span(self, num_tokens: int) -> bool:
        """Whether a prefix of ``num_tokens`` ends inside a pruned span.

        A step may compute part of an unpruned span, because no selection needs all of it.
        """
        span = self._next_pruned(num_tokens)
        return span is not None and span.offset < num_tokens

    def next_span_end(self, after: int) -> int | None:
        """The first end of a span past ``after``."""
        index = bisect_right(self._ends, after)
        return self._ends[index] if index < len(self._ends) else None

    def last_span_end(self, num_tokens: int) -> int:
        """The last end of a span within the first ``num_tokens`` tokens; 0 where none is."""
        index = bisect_right(self._ends, num_tokens)
        return self._ends[index - 1] if index else 0

    def last_whole_end(self, start: int, end: int) -> int:
        """The largest e <= ``end`` such that [start, e) cuts no pruned span in two.

        ``start`` must not lie inside a pruned span.
        """
        span = self._next_pruned(end)
        return end if span is None or span.offset >= end else max(start, span.offset)
