"""How many visual tokens each stage computes, and how many KV slots a prefix takes in it.

A *stage*, with an Arabic number, is a run of decoder layers that compute the same tokens. Stage 0
begins at layer 0, stage 1 at the shallow boundary and stage 2 at the deep boundary. A Stage with a
Roman number is one of the paper's selections: Stage I in the vision encoder, Stage II at the
shallow boundary, Stage III at the deep boundary.

All numbers follow from an image's token count and its ratio, by arithmetic. So the processor, the
scheduler and the worker know them before a forward pass. ``selectors`` decides later, on the
device, *which* tokens are kept.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

from vitcop_vllm.pruning.budgets import SELECTORS, BudgetInputs
from vitcop_vllm.pruning.settings import PruningSettings

NUM_STAGES = 3


@dataclass(frozen=True)
class VisualTokenCounts:
    """Visual tokens of one image: from the encoder, and in each stage.

    Attributes:
        encoder: V, visual tokens from the vision encoder.
        centres: K, cluster centres; 0 without clusters.
        stages: (n1, n2, n3), visual tokens in stages 0, 1 and 2: those that Stage I, II and III
            keep.
    """

    encoder: int
    centres: int
    stages: tuple[int, int, int]

    def __post_init__(self) -> None:
        n1, n2, n3 = self.stages
        if not self.encoder >= n1 >= n2 >= n3 >= 1 or not 0 <= self.centres <= n1:
            raise ValueError(
                f"impossible visual token counts {self}: V >= n1 >= n2 >= n3 >= 1 and "
                "0 <= K <= n1 must hold"
            )

    @classmethod
    def unpruned(cls, encoder: int) -> Self:
        return cls(encoder, 0, (encoder, encoder, encoder))

    @property
    def is_pruned(self) -> bool:
        return self.stages[-1] < self.encoder

    @property
    def dropped(self) -> tuple[int, int, int]:
        """Placeholders without a KV slot in each stage: 0, n1 - n2, n1 - n3."""
        n1, n2, n3 = self.stages
        return 0, n1 - n2, n1 - n3

    def layer_average(self, boundaries: tuple[int, int], num_layers: int) -> float:
        """Visual tokens per layer, averaged over the decoder's layers."""
        n1, n2, n3 = self.stages
        shallow, deep = boundaries
        total = shallow * n1 + (deep - shallow) * n2 + (num_layers - deep) * n3
        return total / num_layers

    def encode(self) -> str:
        """The counts as a short text, which :meth:`decode` reads."""
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
    """Counts per stage for one image, by the budget rule of the settings' selector.

    For ViTCoP itself (arXiv 2601.17818), with keep fraction r = 1 - ratio, Stage I fraction
    v, boundaries S and D of L layers: n1 = int(v V),
    n2 = round((L r / v - S) / ((D - S) + (L - D) / 5) n1), n3 = round(n2 / 5). If that gives
    n2 > n1 (mild pruning), n2 is n1, and n3 follows from the rest of the budget, so that the
    layer average is still r V.

    Args:
        settings: The operator's settings.
        ratio: Share of visual tokens removed, averaged over layers, in [0, 1).
        num_layers: L, decoder layers.
        encoder_tokens: V, the image's visual tokens from the encoder.

    Raises:
        ValueError: If the ratio is outside [0, 1) or above the selector's largest ratio, or V is
            not positive.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"pruning ratio {ratio} is outside [0, 1)")
    if encoder_tokens < 1:
        raise ValueError(f"an image has at least one visual token, got {encoder_tokens}")
    if ratio == 0.0:
        return VisualTokenCounts.unpruned(encoder_tokens)
    boundaries = settings.boundaries(num_layers)
    selector = SELECTORS[settings.selector]
    max_ratio = selector.max_ratio(boundaries, num_layers)
    if ratio > max_ratio:
        raise ValueError(
            f"selector {settings.selector!r} cannot reach pruning ratio {ratio}: its largest ratio "
            f"for this model is {max_ratio}"
        )
    keep = 1.0 - ratio
    centres, stages = selector.budget(
        settings, BudgetInputs(keep, encoder_tokens, num_layers, *boundaries)
    )
    if stages[-1] == encoder_tokens:
        return VisualTokenCounts.unpruned(encoder_tokens)
    return VisualTokenCounts(encoder_tokens, centres, stages)


def dummy_ratio(settings: PruningSettings, num_layers: int) -> float:
    """Pruning ratio of warm-ups and memory profiling; 0 if the settings allow no pruning.

    It is mild: Stages I, II and III all drop or merge tokens, and many tokens are kept.
    """
    max_ratio = SELECTORS[settings.selector].max_ratio(settings.boundaries(num_layers), num_layers)
    return min(0.5, settings.max_pruning_ratio, max_ratio)


def effective_ratio(
    counts: Iterable[VisualTokenCounts], boundaries: tuple[int, int], num_layers: int
) -> float | None:
    """Share of visual tokens removed, averaged over layers and images.

    ``None`` for a request without images.
    """
    encoder = kept = 0.0
    for image in counts:
        encoder += image.encoder
        kept += image.layer_average(boundaries, num_layers)
    return 1.0 - kept / encoder if encoder else None


@dataclass(frozen=True)
class VisualSpan:
    """The placeholders of one image in a prompt: n1 tokens from ``offset``."""

    offset: int
    counts: VisualTokenCounts

    @property
    def end(self) -> int:
        return self.offset + self.counts.stages[0]


@dataclass(frozen=True)
class RequestPlan:
    """All visual spans of one request, in prompt order.

    The *physical* length of a prefix in a stage is the number of its KV slots in that stage.
    Dropped visual tokens have no slot.
    """

    spans: tuple[VisualSpan, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return [span.end for span in self.spans]

    @cached_property
    def _dropped(self) -> list[tuple[int, int, int]]:
        """Tokens dropped per stage by the first k spans, for k = 0..len(spans)."""
        sums = [(0, 0, 0)]
        for span in self.spans:
            a, b, c = sums[-1]
            x, y, z = span.counts.dropped
            sums.append((a + x, b + y, c + z))
        return sums

    @cached_property
    def is_pruned(self) -> bool:
        """Whether any image of the request is pruned, in the encoder or in the decoder."""
        return any(span.counts.is_pruned for span in self.spans)

    @cached_property
    def drops_slots(self) -> bool:
        """Whether any stage holds fewer KV slots than the prompt has tokens."""
        return any(self._dropped[-1])

    @cached_property
    def patches_per_placeholder(self) -> tuple[int, int]:
        """V and n1 of the image with the largest V / n1."""
        counts = max((span.counts for span in self.spans), key=lambda c: c.encoder / c.stages[0])
        return counts.encoder, counts.stages[0]

    @cached_property
    def longest_span(self) -> int:
        """The largest n1 of the request's images."""
        return max(span.counts.stages[0] for span in self.spans)

    def dropped_tokens(self, num_tokens: int) -> tuple[int, int, int]:
        """Per stage, how many of the first ``num_tokens`` tokens have no slot.

        Only spans that end within the prefix count. No step ends inside a pruned span.
        """
        return self._dropped[bisect_right(self._ends, num_tokens)]

    def num_slots(self, num_tokens: int, stage: int) -> int:
        """KV slots that the first ``num_tokens`` tokens take in ``stage``."""
        return num_tokens - self.dropped_tokens(num_tokens)[stage]

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
        """The first pruned span whose end is greater than ``after``."""
        index = bisect_right(self._pruned_ends, after)
        return self._pruned[index] if index < len(self._pruned) else None

    def cuts_span(self, num_tokens: int) -> bool:
        """Whether a prefix of ``num_tokens`` ends inside a pruned span.

        Unpruned spans do not count: a step may compute part of an unpruned image.
        """
        span = self._next_pruned(num_tokens)
        return span is not None and span.offset < num_tokens

    def next_span_end(self, after: int) -> int | None:
        """The first end of a span greater than ``after``; ``None`` if there is none."""
        index = bisect_right(self._ends, after)
        return self._ends[index] if index < len(self._ends) else None

    def last_span_end(self, num_tokens: int) -> int:
        """The last end of a span within the first ``num_tokens`` tokens; 0 if there is none."""
        index = bisect_right(self._ends, num_tokens)
        return self._ends[index - 1] if index else 0

    def last_whole_end(self, start: int, end: int) -> int:
        """The largest e <= ``end`` such that [start, e) cuts no pruned span in two.

        ``start`` must not lie inside a pruned span.
        """
        span = self._next_pruned(end)
        return end if span is None or span.offset >= end else max(start, span.offset)
