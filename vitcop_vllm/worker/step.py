"""One engine step, seen by each stage.

vLLM plans a step in prompt positions. A stage sees fewer rows and shorter sequences; both
follow from the requests' plans by arithmetic, on the host, before anything is computed.
Which rows survive is decided on the device and never needed here.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vitcop_vllm.engine.attention import StageLengths, StageRows
from vitcop_vllm.pruning.identity import Feature
from vitcop_vllm.pruning.plan import NUM_STAGES, RequestPlan, VisualTokenCounts

Ints = npt.NDArray[np.int64]


class ScheduledRequest(NamedTuple):
    """A request's part in a step.

    Attributes:
        plan: Its plan, ``None`` where it prunes nothing.
        start: Tokens computed before the step.
        end: Tokens computed after it.
        prompt_tokens: Length of its prompt, placeholders included.
        features: Its pictures, which are asked for their names.
    """

    plan: RequestPlan | None
    start: int
    end: int
    prompt_tokens: int
    features: Sequence[Feature] = ()


@dataclass(frozen=True)
class SpanGroup:
    """Visual spans of a step with equal counts, selected in one batch; G spans.

    Attributes:
        counts: What all of them keep.
        pictures: Which of the step's pruned pictures they are, counted in order of rows.
        first_rows: (NUM_STAGES, G) int64, first row of each span in each stage.
        prompt_rows: (NUM_STAGES, 2, G) int64, first and last row of the prompt that each span
            is of; of no meaning where the step does not compute the whole prompt.
    """

    counts: VisualTokenCounts
    pictures: tuple[int, ...]
    first_rows: torch.Tensor
    prompt_rows: torch.Tensor

    def rows(self, stage: int) -> torch.Tensor:
        """(G, n_stage) int64: the rows of the spans in ``stage``."""
        offsets = torch.arange(self.counts.stages[stage], device=self.first_rows.device)
        return self.first_rows[stage, :, None] + offsets


@dataclass(frozen=True)
class StagedForward:
    """How rows change between stages, in a step where they do.

    Attributes:
        groups: Spans computed in this step that lose tokens after Stage I.
        sources: Stage -> (T_stage,) int64, each row's row in the stage before; rows of
            spans in ``groups`` are placeholders until the selection is known.
        outputs: (T_0,) int64, for each row of stage 0 the row of the last stage that
            stands for it: itself, or the last survivor of its span.
        renumbered: (T_1,) int64, rotary positions of stage 1's rows for the deepest
            stage under ``positions: reference``; ``None`` keeps prompt positions.
        record: Told what each group chooses: group, stage, choice.
    """

    groups: tuple[SpanGroup, ...]
    sources: dict[int, torch.Tensor]
    outputs: torch.Tensor
    renumbered: torch.Tensor | None
    record: Callable[[SpanGroup, int, Any], None] | None = None


@dataclass(frozen=True)
class StagedStep:
    """A step with at least one pruned request.

    Attributes:
        stages: What each stage sees; stage 0 is vLLM's own and absent.
        forward: ``None`` where all stages see the same rows, as when decoding: vLLM's own
            forward is right as it is, and may be run from a CUDA graph.
    """

    stages: Mapping[int, StageRows | StageLengths]
    forward: StagedForward | None


class _HostRows(NamedTuple):
    """Rows of a step in one stage, on the host."""

    starts: Ints
    ends: Ints
    first: Ints

    @classmethod
    def of(cls, starts: Ints, ends: Ints) -> Self:
        return cls(starts, ends, np.concatenate(([0], np.cumsum(ends - starts))))

    @property
    def positions(self) -> Ints:
        lengths = self.ends - self.starts
        return np.arange(self.first[-1]) + np.repeat(self.starts - self.first[:-1], lengths)


class _SpanRows(NamedTuple):
    """First row of a span, first and last of its prompt, in one stage."""

    first: int
    prompt_first: int
    prompt_last: int


def build_step(
    requests: Sequence[ScheduledRequest],
    device: torch.device,
    *,
    renumber_deep: bool = False,
) -> StagedStep | None:
    """What each stage computes in a step.

    Args:
        requests: The step's requests in row order.
        device: Where the tensors are needed.
        renumber_deep: ``positions: reference``.

    Returns:
        ``None`` where no request of the step is without slots in any stage.
    """
    if not any(r.plan is not None and r.plan.drops_slots for r in requests):
        return None
    starts = np.array([r.start for r in requests], dtype=np.int64)
    ends = np.array([r.end for r in requests], dtype=np.int64)
    before = np.zeros((NUM_STAGES, len(requests)), dtype=np.int64)
    after = np.zeros_like(before)
    for i, request in enumerate(requests):
        if request.plan is not None:
            before[:, i] = request.plan.dropped_tokens(request.start)
            after[:, i] = request.plan.dropped_tokens(request.end)
    host = [_HostRows.of(starts - before[s], ends - after[s]) for s in range(NUM_STAGES)]
    forward = _plan_forward(requests, host, device, renumber_deep)
    if forward is None:
        return StagedStep(_stage_lengths(host, after, device), None)
    later = range(1, NUM_STAGES)
    return StagedStep({stage: _stage_rows(host[stage], device) for stage in later}, forward)


def _stage_rows(rows: _HostRows, device: torch.device) -> StageRows:
    query_start_loc = torch.from_numpy(rows.first.astype(np.int32))
    seq_lens = torch.from_numpy(rows.ends.astype(np.int32))
    return StageRows(
        query_start_loc=async_tensor_h2d(query_start_loc, device=device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=async_tensor_h2d(seq_lens, device=device),
        seq_lens_cpu=seq_lens,
        positions=async_tensor_h2d(rows.positions, device=device),
        num_rows=int(rows.first[-1]),
        max_query_len=int((rows.ends - rows.starts).max()),
        max_seq_len=int(rows.ends.max()),
    )


def _stage_lengths(
    host: Sequence[_HostRows], missing: Ints, device: torch.device
) -> dict[int, StageLengths]:
    """Of a step whose rows are the same in all stages; ``missing`` is (NUM_STAGES, R)."""
    on_host = torch.from_numpy(missing.astype(np.int32))
    on_device = async_tensor_h2d(on_host, device=device)  # all stages at once
    return {
        stage: StageLengths(on_device[stage], on_host[stage], int(host[stage].ends.max()))
        for stage in range(1, NUM_STAGES)
    }


def _find_spans(
    requests: Sequence[ScheduledRequest], host: Sequence[_HostRows]
) -> dict[VisualTokenCounts, list[tuple[int, list[_SpanRows]]]]:
    """Spans of the step that lose tokens after Stage I, by counts.

    Returns:
        Counts -> [(the picture's number among the step's pruned ones, the span's rows in each
        stage)].
    """
    found: dict[VisualTokenCounts, list[tuple[int, list[_SpanRows]]]] = defaultdict(list)
    pictures = 0
    for i, request in enumerate(requests):
        if request.plan is None:
            continue
        dropped = request.plan.dropped_tokens(request.prompt_tokens)
        for span in request.plan.spans_in(request.start, request.end):
            if any(span.counts.dropped):
                gone = request.plan.dropped_tokens(span.offset)
                places = []
                for stage, rows in enumerate(host):
                    prompt = int(rows.first[i] - rows.starts[i])
                    last = prompt + request.prompt_tokens - dropped[stage] - 1
                    places.append(_SpanRows(prompt + span.offset - gone[stage], prompt, last))
                found[span.counts].append((pictures, places))
            pictures += span.counts.is_pruned
    return found


def _plan_forward(
    requests: Sequence[ScheduledRequest],
    host: Sequence[_HostRows],
    device: torch.device,
    renumber_deep: bool,
) -> StagedForward | None:
    found = _find_spans(requests, host)
    renumbered = _renumber(requests, host[1]) if renumber_deep else None
    if not found and renumbered is None:
        return None
    outputs = np.arange(int(host[0].first[-1]))
    sources = {}
    for stage in range(1, NUM_STAGES):
        kept = np.ones(int(host[stage - 1].first[-1]), dtype=np.bool_)
        for counts, members in found.items():
            for _, places in members:
                begin = places[stage - 1].first
                kept[begin + counts.stages[stage] : begin + counts.stages[stage - 1]] = False
        sources[stage] = async_tensor_h2d(np.flatnonzero(kept), device=device)
        outputs = (np.cumsum(kept) - 1)[outputs]
    groups = []
    for counts, members in found.items():
        rows = np.array([places for _, places in members], dtype=np.int64)  # (G, stages, 3)
        placed = async_tensor_h2d(rows.transpose(1, 2, 0).copy(), device=device)
        numbers = tuple(number for number, _ in members)
        groups.append(SpanGroup(counts, numbers, placed[:, 0], placed[:, 1:]))
    return StagedForward(
        groups=tuple(groups),
        sources=sources,
        outputs=async_tensor_h2d(outputs, device=device),
        renumbered=None if renumbered is None else async_tensor_h2d(renumbered, device=device),
    )


def _renumber(requests: Sequence[ScheduledRequest], rows: _HostRows) -> Ints | None:
    """Positions of stage 1's rows where prefill counts in the compacted sequence.

    Decoded tokens still count from the prompt's length (METHOD of the published program).
    ``None`` where no prefill token of a pruned request is in the step.
    """
    positions = rows.positions
    prefilling = False
    for i, request in enumerate(requests):
        span = slice(int(rows.first[i]), int(rows.first[i + 1]))
        if request.plan is None:
            continue
        missing = request.plan.dropped_tokens(request.prompt_tokens)[1]
        decoded = positions[span] >= request.prompt_tokens - missing
        positions[span] += np.where(decoded, missing, 0)
        prefilling |= bool((~decoded).any())
    return positions if prefilling else None
