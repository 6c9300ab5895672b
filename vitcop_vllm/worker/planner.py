"""Plans each step. A decode step costs a few array operations, for any number of requests.

The number of a request's dropped tokens changes only when a visual span ends. So arrays hold these
numbers, and a loop visits only the requests whose step passes the end of a span.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.engine.attention import DecodeView, PrefillView
from vitcop_vllm.pruning.identity import Feature, plan_request, span_names
from vitcop_vllm.pruning.plan import NUM_SEGMENTS, RequestPlan, VisualTokenCounts
from vitcop_vllm.worker.step import PrunedSpan, SpanGroup, StagedForward, StagedStep

Ints = npt.NDArray[np.int64]

_FOREVER = np.iinfo(np.int64).max


class _Request(NamedTuple):
    """A request with at least one pruned image.

    Attributes:
        plan: Its plan.
        prompt_tokens: Length of its prompt, placeholders included.
        images: Name of each span's image or frame; empty where none is needed.
    """

    plan: RequestPlan
    prompt_tokens: int
    images: Sequence[str]


class _HostRows(NamedTuple):
    """Rows of a step in one segment, on the host; R requests.

    Attributes:
        starts, ends: (R,) physical length of each request before and after the step.
        first: (R + 1,) first row of each request.
    """

    starts: Ints
    ends: Ints
    first: Ints

    @classmethod
    def of(cls, starts: Ints, ends: Ints) -> Self:
        return cls(starts, ends, np.concatenate(([0], np.cumsum(ends - starts))))

    @property
    def positions(self) -> Ints:
        """(T,) physical position of each row."""
        lengths = self.ends - self.starts
        return np.arange(self.first[-1]) + np.repeat(self.starts - self.first[:-1], lengths)

    def to_device(self, device: torch.device) -> PrefillView:
        query_start_loc = torch.from_numpy(self.first.astype(np.int32))
        seq_lens = torch.from_numpy(self.ends.astype(np.int32))
        return PrefillView(
            query_start_loc=async_tensor_h2d(query_start_loc, device=device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=async_tensor_h2d(seq_lens, device=device),
            seq_lens_cpu=seq_lens,
            positions=async_tensor_h2d(self.positions, device=device),
            num_rows=int(self.first[-1]),
            max_query_len=int((self.ends - self.starts).max()),
            max_seq_len=int(self.ends.max()),
        )


class _Span(NamedTuple):
    """A span that loses tokens after Stage I.

    Attributes:
        number: Of its image among the step's pruned images.
        first_rows: Its first row in each segment.
        prompt_rows: First and last row of its prompt in each segment; empty if no selector reads
            them.
    """

    number: int
    first_rows: list[int]
    prompt_rows: list[tuple[int, int]]


class StepPlanner:
    """What each segment computes in a step, from the plans of the requests that are alive.

    Args:
        device: Where a step's tensors are needed.
        renumber_deep: Whether ``positions: reference`` is set.
        find_prompts: Whether the selector reads the question, and so the rows of a prompt.
    """

    def __init__(
        self, device: torch.device, *, renumber_deep: bool = False, find_prompts: bool = False
    ) -> None:
        self._device = device
        self._renumber_deep = renumber_deep
        self._find_prompts = find_prompts
        # Requests that prune nothing share slot 0.
        self._slots: dict[str, int] = {}
        self._requests: dict[int, _Request] = {}
        self._free: list[int] = []
        self._allocate(1)
        self._until[0] = _FOREVER

    def _allocate(self, num_slots: int) -> None:
        # Per slot: tokens dropped in each segment, valid for prefixes of at least `since` and fewer
        # than `until` tokens.
        self._missing = np.zeros((NUM_SEGMENTS, num_slots), dtype=np.int64)
        self._since = np.zeros(num_slots, dtype=np.int64)
        self._until = np.zeros(num_slots, dtype=np.int64)
        self._prompt_tokens = np.zeros(num_slots, dtype=np.int64)

    def add(self, name: str, features: Iterable[Feature], prompt_tokens: int) -> None:
        """Add a request, or replace the images of a known one.

        Args:
            name: The request's id.
            features: Its images, in prompt order.
            prompt_tokens: Length of its prompt, placeholders included.
        """
        features = [*features]
        images = [name for feature in features for name in span_names(feature.identifier)]
        self.track(name, plan_request(features), prompt_tokens, images)

    def track(
        self,
        name: str,
        plan: RequestPlan | None,
        prompt_tokens: int,
        images: Sequence[str] = (),
    ) -> None:
        """:meth:`add` for a plan that is known, with the names of its spans' images."""
        self.remove(name)
        if plan is None:
            return
        slot = self._free.pop() if self._free else self._new_slot()
        self._slots[name] = slot
        self._requests[slot] = _Request(plan, prompt_tokens, images)
        self._until[slot] = 0  # the first step looks the numbers up
        self._prompt_tokens[slot] = prompt_tokens

    def remove(self, name: str) -> None:
        """Remove a request; ignores unknown names."""
        if slot := self._slots.pop(name, 0):
            del self._requests[slot]
            self._free.append(slot)

    def _new_slot(self) -> int:
        used = self._until.shape[0]
        old = self._missing, self._since, self._until, self._prompt_tokens
        self._allocate(2 * used)
        new = self._missing, self._since, self._until, self._prompt_tokens
        for larger, smaller in zip(new, old, strict=True):
            larger[..., :used] = smaller
        self._free.extend(range(used + 1, 2 * used))
        return used

    def plan_step(
        self,
        names: Iterable[str],
        starts: npt.NDArray[np.integer],
        ends: npt.NDArray[np.integer],
    ) -> StagedStep | None:
        """What each segment computes in a step of R requests.

        Args:
            names: Request ids in row order.
            starts: (R,) tokens of each request that are computed before the step.
            ends: (R,) after it.

        Returns:
            ``None`` where every segment computes what vLLM planned.
        """
        if not self._slots:
            return None
        start: Ints = starts.astype(np.int64)
        end: Ints = ends.astype(np.int64)
        slots = np.fromiter(map(self._slots.get, names, repeat(0)), np.int64, len(start))
        if not slots.any():
            return None
        after = self._missing[:, slots]
        changed = np.flatnonzero((start < self._since[slots]) | (end >= self._until[slots]))
        renumbers = self._renumber_deep and bool(
            ((slots > 0) & (start < self._prompt_tokens[slots])).any()
        )
        if not changed.size and not renumbers:
            return self._same_rows(end, after)
        before = after.copy()
        for row in changed.tolist():
            slot = int(slots[row])
            before[:, row] = self._requests[slot].plan.dropped_tokens(int(start[row]))
            after[:, row] = self._look_up(slot, int(end[row]))
        rows = [_HostRows.of(start - before[s], end - after[s]) for s in range(NUM_SEGMENTS)]
        spans, images = self._find_spans(changed, slots, start, end, rows)
        renumbered = self._renumber(slots, rows[1]) if renumbers else None
        if not spans and renumbered is None:
            return self._same_rows(end, after)
        later = range(1, NUM_SEGMENTS)
        return StagedStep(
            {segment: rows[segment].to_device(self._device) for segment in later},
            self._plan_forward(spans, images, rows, renumbered),
        )

    def _look_up(self, slot: int, num_tokens: int) -> tuple[int, int, int]:
        """Tokens that a prefix drops per segment; stored until the next span ends."""
        plan = self._requests[slot].plan
        missing = plan.dropped_tokens(num_tokens)
        next_end = plan.next_span_end(num_tokens)
        self._missing[:, slot] = missing
        self._since[slot] = plan.last_span_end(num_tokens)
        self._until[slot] = _FOREVER if next_end is None else next_end
        return missing

    def _same_rows(self, ends: Ints, missing: Ints) -> StagedStep | None:
        """A step whose rows are the same in all segments; ``missing`` is (NUM_SEGMENTS, R)."""
        if not missing.any():
            return None
        on_host = torch.from_numpy(missing.astype(np.int32))
        on_device = async_tensor_h2d(on_host, device=self._device)  # all segments at once
        longest = (ends - missing).max(axis=1).tolist()
        lengths: Mapping[int, PrefillView | DecodeView] = {
            segment: DecodeView(on_device[segment], on_host[segment], longest[segment])
            for segment in range(1, NUM_SEGMENTS)
        }
        return StagedStep(lengths, None)

    def _find_spans(
        self,
        changed: Ints,
        slots: Ints,
        starts: Ints,
        ends: Ints,
        rows: Sequence[_HostRows],
    ) -> tuple[dict[VisualTokenCounts, list[_Span]], list[PrunedSpan]]:
        """Spans of the step that lose tokens after Stage I, and the step's pruned images.

        Args:
            changed: Rows whose step passes an end of a span.
            slots: (R,) slot of each request.
            starts: (R,) tokens before the step.
            ends: (R,) tokens after it.
            rows: Of each segment.

        Returns:
            Counts -> spans; and all pruned images and frames, in row order.
        """
        found: dict[VisualTokenCounts, list[_Span]] = {}
        images: list[PrunedSpan] = []
        for row in changed.tolist():
            plan, prompt_tokens, names = self._requests[int(slots[row])]
            for i, span in enumerate(plan.spans):
                if not starts[row] <= span.offset < ends[row]:
                    continue
                if any(span.counts.dropped):
                    # Row of the prompt's first token in each segment, if the step computed it.
                    begins = [int(segment.first[row] - segment.starts[row]) for segment in rows]
                    dropped = plan.dropped_tokens(span.offset)
                    first_rows = [
                        begin + span.offset - missing
                        for begin, missing in zip(begins, dropped, strict=True)
                    ]
                    prompts: list[tuple[int, int]] = []
                    if self._find_prompts:
                        dropped = plan.dropped_tokens(prompt_tokens)
                        prompts = [
                            (begin, begin + prompt_tokens - missing - 1)
                            for begin, missing in zip(begins, dropped, strict=True)
                        ]
                    span_found = _Span(len(images), first_rows, prompts)
                    found.setdefault(span.counts, []).append(span_found)
                if span.counts.is_pruned:
                    name = names[i] if names else ""
                    images.append(PrunedSpan(name, span.counts.stages[0]))
        return found, images

    def _plan_forward(
        self,
        found: Mapping[VisualTokenCounts, Sequence[_Span]],
        images: Sequence[PrunedSpan],
        rows: Sequence[_HostRows],
        renumbered: Ints | None,
    ) -> StagedForward:
        outputs = np.arange(int(rows[0].first[-1]))
        sources = {}
        for segment in range(1, NUM_SEGMENTS):
            kept = np.ones(int(rows[segment - 1].first[-1]), dtype=np.bool_)
            for counts, spans in found.items():
                before, after = counts.stages[segment - 1 : segment + 1]
                for span in spans:
                    begin = span.first_rows[segment - 1]
                    kept[begin + after : begin + before] = False
            sources[segment] = self._to_device(np.flatnonzero(kept))
            outputs = (np.cumsum(kept) - 1)[outputs]
        groups = []
        for counts, spans in found.items():
            first_rows = np.array([span.first_rows for span in spans], dtype=np.int64).T
            prompt_rows = None
            if self._find_prompts:
                prompts = np.array([span.prompt_rows for span in spans], dtype=np.int64)
                prompt_rows = self._to_device(prompts.transpose(1, 2, 0).copy())
            numbers = tuple(span.number for span in spans)
            placed = self._to_device(first_rows.copy())
            groups.append(SpanGroup(counts, numbers, placed, prompt_rows))
        return StagedForward(
            groups=tuple(groups),
            sources=sources,
            outputs=self._to_device(outputs),
            renumbered=None if renumbered is None else self._to_device(renumbered),
            images=tuple(images),
        )

    def _to_device(self, values: Ints) -> torch.Tensor:
        return async_tensor_h2d(values, device=self._device)

    def _renumber(self, slots: Ints, rows: _HostRows) -> Ints | None:
        """Positions of segment 1's rows where prefill counts in the compacted sequence.

        Decoded tokens still count from the prompt's length, as in the published program.
        ``None`` where no prefill token of a pruned request is in the step.
        """
        positions = rows.positions
        prefilling = False
        for row in np.flatnonzero(slots).tolist():
            plan, prompt_tokens, _ = self._requests[int(slots[row])]
            of_request = slice(int(rows.first[row]), int(rows.first[row + 1]))
            missing = plan.dropped_tokens(prompt_tokens)[1]
            decoded = positions[of_request] >= prompt_tokens - missing
            positions[of_request] += np.where(decoded, missing, 0)
            prefilling |= bool((~decoded).any())
        return positions if prefilling else None
