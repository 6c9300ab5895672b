"""A step's arithmetic, compared with rows listed one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.device_guard import CUDA, no_host_sync
from tests.worker.steps import ScheduledRequest, build_step, common_metadata
from vitcop_vllm.engine.attention import SegmentBuild
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.worker.step import StagedForward


@st.composite
def requests(draw):
    """A request with up to three images between texts, and a chunk that cuts no image."""
    spans, length = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 3))):
        n1, n2, n3 = sorted((draw(st.integers(1, 12)) for _ in range(3)), reverse=True)
        encoder = n1 + draw(st.integers(0, 3))
        spans.append(VisualSpan(length, VisualTokenCounts(encoder, 1, (n1, n2, n3))))
        length += n1 + draw(st.integers(0, 4))
    prompt = length + draw(st.integers(1, 4))
    total = prompt + draw(st.integers(0, 6))
    cuts = [i for i in range(total + 1) if not any(s.offset < i < s.end for s in spans)]
    start, end = sorted(draw(st.lists(st.sampled_from(cuts), min_size=2, max_size=2, unique=True)))
    plan = RequestPlan(tuple(spans))
    return ScheduledRequest(plan if plan.is_pruned else None, start, end, prompt)


batches = st.lists(requests(), min_size=1, max_size=4)


def rows_of(request: ScheduledRequest, segment: int) -> list[int]:
    """Positions that have a row in a segment. A span's rows take its first positions."""
    plan = request.plan or RequestPlan(())
    dropped = {
        position
        for span in plan.spans
        for position in range(span.offset + span.counts.stages[segment], span.end)
    }
    return [i for i in range(request.start, request.end) if i not in dropped]


def forward_of(batch: list[ScheduledRequest]) -> StagedForward | None:
    step = build_step(batch)
    return step.forward if step else None


def test_a_step_without_dropped_slots_has_no_plan():
    unpruned = RequestPlan((VisualSpan(0, VisualTokenCounts.unpruned(4)),))
    assert build_step([ScheduledRequest(None, 0, 5, 5)]) is None
    assert build_step([ScheduledRequest(unpruned, 0, 5, 5)]) is None


@given(batches)
def test_segments_hold_the_kept_rows(batch):
    step = build_step(batch)
    if step is None:
        return
    common = common_metadata([(request.start, request.end) for request in batch])
    for segment, rows in step.segments.items():
        seen = rows.to_metadata(common, torch.zeros(len(batch), dtype=torch.int32))
        expected = [rows_of(request, segment) for request in batch]
        lengths = [len(part) for part in expected]
        starts = [sum(lengths[:i]) for i in range(len(batch) + 1)]
        assert seen.query_start_loc.tolist() == seen.query_start_loc_cpu.tolist() == starts
        assert seen.num_actual_tokens == sum(lengths)
        assert seen.max_query_len == max(lengths)
        assert seen.slot_mapping.shape[0] == sum(lengths)
        physical = [
            request.end if request.plan is None else request.plan.num_slots(request.end, segment)
            for request in batch
        ]
        assert seen.seq_lens.tolist() == seen.seq_lens_cpu_upper_bound.tolist() == physical
        assert seen.max_seq_len == max(physical)
        # The step's slots directly follow those of earlier steps.
        first, positions = rows.slot_inputs(common.query_start_loc, common.positions)
        assert first.tolist() == starts
        assert positions.tolist() == [
            position
            for length, count in zip(physical, lengths, strict=True)
            for position in range(length - count, length)
        ]


@given(batches)
def test_sources_are_row_numbers_of_the_previous_stage(batch):
    forward = forward_of(batch)
    if forward is None:
        return
    ids = {
        segment: [(i, p) for i, r in enumerate(batch) for p in rows_of(r, segment)]
        for segment in range(3)
    }
    for segment, source in forward.sources.items():
        assert [ids[segment - 1][row] for row in source.tolist()] == ids[segment]


@given(batches)
def test_groups_hold_the_rows_of_their_spans(batch):
    forward = forward_of(batch)
    images = [
        (i, span)
        for i, request in enumerate(batch)
        for span in (request.plan.spans if request.plan else ())
        if request.start <= span.offset < request.end and span.counts.is_pruned
    ]
    groups = forward.groups if forward else ()
    named = sorted(image for group in groups for image in group.images)
    assert named == [n for n, (_, span) in enumerate(images) if any(span.counts.dropped)]
    for group in groups:
        for member, image in enumerate(group.images):
            i, span = images[image]
            assert span.counts == group.counts
            for segment in range(3):
                ids = [(i, p) for i, r in enumerate(batch) for p in rows_of(r, segment)]
                expected = [(i, span.offset + k) for k in range(span.counts.stages[segment])]
                assert [ids[row] for row in group.rows(segment)[member].tolist()] == expected


@given(batches)
def test_groups_hold_the_rows_of_their_prompts(batch):
    """Selectors that read the question use these rows. Their step computes the whole prompt."""
    whole = [r._replace(start=0, end=max(r.end, r.prompt_tokens)) for r in batch]
    plain = forward_of(whole)
    assert plain is None or all(group.prompt_rows is None for group in plain.groups)
    step = build_step(whole, find_prompts=True)
    forward = step.forward if step else None
    requests = [
        request
        for request in whole
        for span in (request.plan.spans if request.plan else ())
        if span.counts.is_pruned
    ]
    for group in forward.groups if forward else ():
        assert group.prompt_rows is not None
        for member, image in enumerate(group.images):
            for segment in range(3):
                ids = [(r, p) for r in whole for p in rows_of(r, segment)]
                first, last = group.prompt_rows[segment, :, member].tolist()
                request = requests[image]
                positions = [p for p in rows_of(request, segment) if p < request.prompt_tokens]
                assert [p for _, p in ids[first : last + 1]] == positions
                assert all(r is request for r, _ in ids[first : last + 1])


@given(batches)
def test_outputs_of_dropped_tokens_repeat_the_last_kept_row_of_the_span(batch):
    forward = forward_of(batch)
    if forward is None:
        return
    alive = [(i, p) for i, r in enumerate(batch) for p in rows_of(r, 2)]
    everything = [(i, p) for i, r in enumerate(batch) for p in range(r.start, r.end)]
    for row, (i, position) in zip(forward.outputs.tolist(), everything, strict=True):
        assert alive[row] == (i, max(p for j, p in alive if j == i and p <= position))


@given(batches)
def test_reference_positions_renumber_the_prompt_but_not_the_answer(batch):
    step = build_step(batch, renumber_deep=True)
    if step is None:
        return
    expected = []
    for request in batch:
        plan = request.plan or RequestPlan(())
        for position in rows_of(request, 1):
            if request.plan is None or position >= request.prompt_tokens:
                expected.append(position)
            else:
                inside = [s for s in plan.spans if s.offset <= position < s.end]
                before = inside[0].offset if inside else position
                expected.append(position - plan.dropped_tokens(before)[1])
    if step.forward is None or step.forward.renumbered is None:
        assert all(r.plan is None or r.start >= r.prompt_tokens for r in batch)
    else:
        assert step.forward.renumbered.tolist() == expected


@given(batches)
def test_decode_steps_run_the_unstaged_forward(batch):
    decodes = [r._replace(start=r.prompt_tokens, end=r.prompt_tokens + 1) for r in batch]
    step = build_step(decodes, renumber_deep=True)
    assert step is None or step.forward is None


@given(batches, st.integers(0, 3))
def test_requests_that_pad_a_graph_have_no_tokens(batch, padding):
    decodes = [r._replace(start=r.prompt_tokens, end=r.prompt_tokens + 1) for r in batch]
    step = build_step(decodes)
    spans = [(request.start, request.end) for request in decodes]
    padded = common_metadata(spans, padding=padding)
    for rows in step.segments.values() if step else ():
        place = torch.full((len(batch) + 4,), 77, dtype=torch.int32)
        seen = rows.to_metadata(padded, place)
        alone = rows.to_metadata(common_metadata(spans), torch.zeros_like(place))
        assert seen.seq_lens.tolist() == alone.seq_lens.tolist() + [0] * padding
        assert seen.seq_lens_cpu_upper_bound.tolist() == seen.seq_lens.tolist()
        assert seen.seq_lens.data_ptr() == place.data_ptr()
        # A graph reads these tensors from vLLM's own buffers.
        assert seen.query_start_loc.data_ptr() == padded.query_start_loc.data_ptr()
        assert seen.slot_mapping.data_ptr() == padded.slot_mapping.data_ptr()
        assert seen.num_actual_tokens == padded.num_actual_tokens == len(batch) + padding
        assert padded.seq_lens.tolist() == [end for _, end in spans] + [0] * padding


def test_a_step_with_a_pruned_image_runs_the_staged_forward():
    plan = RequestPlan((VisualSpan(1, VisualTokenCounts(9, 2, (6, 4, 2))),))
    assert forward_of([ScheduledRequest(plan, 0, 8, 8)]) is not None
    assert forward_of([ScheduledRequest(plan, 7, 8, 8)]) is None


@pytest.mark.parametrize("renumber_deep", [False, True])
@pytest.mark.parametrize("start", [0, 12, 16], ids=["prefill", "last chunk", "decode"])
def test_a_step_does_not_make_the_host_wait_for_the_gpu(start, renumber_deep):
    plan = RequestPlan((VisualSpan(2, VisualTokenCounts(30, 4, (10, 7, 3))),))
    batch = [ScheduledRequest(plan, start, start + 16, 16), ScheduledRequest(None, 9, 10, 4)]
    if start:
        batch[0] = batch[0]._replace(end=start + 1)
    with no_host_sync():
        step = build_step(batch, CUDA, renumber_deep=renumber_deep)
        assert step is not None
        common = common_metadata([(r.start, r.end) for r in batch], padding=2, device=CUDA)
        for segment in range(3):
            build = SegmentBuild(
                torch.zeros(8, dtype=torch.int32, device=CUDA), step.segments.get(segment)
            )
            seen = build.to_metadata(common)
            assert seen.seq_lens.device == seen.slot_mapping.device == CUDA
        for rows in step.segments.values():
            first, positions = rows.slot_inputs(common.query_start_loc[:3], common.positions)
            assert first.device == positions.device == CUDA
