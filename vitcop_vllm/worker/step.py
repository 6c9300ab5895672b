"""One engine step, as each segment sees it; ``planner`` makes it.

vLLM plans a step in prompt positions. A segment sees fewer rows and shorter sequences; both
follow from the requests' plans by arithmetic, on the host, before anything is computed.
Which rows survive is decided on the device and never needed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vitcop_vllm.engine.attention import DecodeView, PrefillView
from vitcop_vllm.pruning.plan import VisualTokenCounts


@dataclass(frozen=True)
class SpanGroup:
    """Visual spans of a step with equal counts, selected in one batch; G spans.

    Attributes:
        counts: What all of them keep.
        images: Which of the step's pruned images they are, counted in order of rows.
        first_rows: (NUM_SEGMENTS, G) int64, first row of each span in each segment.
        prompt_rows: (NUM_SEGMENTS, 2, G) int64, first and last row of each span's prompt, which the
            step computes as a whole; ``None`` unless the selector reads the question.
    """

    counts: VisualTokenCounts
    images: tuple[int, ...]
    first_rows: torch.Tensor
    prompt_rows: torch.Tensor | None

    def rows(self, segment: int) -> torch.Tensor:
        """(G, n_segment) int64: the rows of the spans in ``segment``."""
        offsets = torch.arange(self.counts.stages[segment], device=self.first_rows.device)
        return self.first_rows[segment, :, None] + offsets


class PrunedSpan(NamedTuple):
    """A pruned image, or a frame of a pruned video, whose visual tokens a step computes.

    Attributes:
        name: Identifier of the image or video.
        num_tokens: n1, its visual tokens after Stage I.
    """

    name: str
    num_tokens: int


@dataclass(frozen=True)
class StagedForward:
    """How rows change between segments, in a step where they do.

    Attributes:
        groups: Spans computed in this step that lose tokens after Stage I.
        sources: Segment -> (T_segment,) int64, each row's row in the segment before; rows of
            spans in ``groups`` are placeholders until the selection is known.
        outputs: (T_0,) int64, for each row of segment 0 the row of the last segment that
            stands for it: itself, or the last survivor of its span.
        renumbered: (T_1,) int64, rotary positions of segment 1's rows for the deepest
            segment under ``positions: reference``; ``None`` keeps prompt positions.
        images: The pruned images and frames of the step, in row order; what
            ``SpanGroup.images`` numbers.
    """

    groups: tuple[SpanGroup, ...]
    sources: dict[int, torch.Tensor]
    outputs: torch.Tensor
    renumbered: torch.Tensor | None
    images: tuple[PrunedSpan, ...] = ()


@dataclass(frozen=True)
class StagedStep:
    """A step with at least one pruned request.

    Attributes:
        segments: What each segment sees; segment 0 is vLLM's own and absent.
        forward: ``None`` where all segments see the same rows, as when decoding: vLLM's own
            forward is right as it is, and may be run from a CUDA graph.
    """

    segments: Mapping[int, PrefillView | DecodeView]
    forward: StagedForward | None
