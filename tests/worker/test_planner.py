"""A planner with earlier steps plans the next step as a new planner does."""

from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.steps import ScheduledRequest, build_step
from vitcop_vllm.engine.attention import DecodeView
from vitcop_vllm.pruning.identity import frame_names, tag_identifier
from vitcop_vllm.pruning.plan import RequestPlan, VisualSpan, VisualTokenCounts
from vitcop_vllm.worker.planner import StepPlanner

CPU = torch.device("cpu")


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        assert actual.tolist() == expected.tolist()
        assert actual.dtype == expected.dtype
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


@st.composite
def prompts(draw):
    """(plan or ``None``, length of the prompt)."""
    spans, length = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 3))):
        n1, n2, n3 = sorted((draw(st.integers(1, 8)) for _ in range(3)), reverse=True)
        spans.append(VisualSpan(length, VisualTokenCounts(n1 + 2, 1, (n1, n2, n3))))
        length += n1 + draw(st.integers(0, 3))
    plan = RequestPlan(tuple(spans))
    return plan if plan.is_pruned else None, length + draw(st.integers(1, 3))


@given(st.data(), st.booleans())
def test_earlier_steps_do_not_change_a_plan(data, renumber_deep):
    """Requests start, are chunked, decode, are preempted, finish, and start again."""
    planner = StepPlanner(CPU, renumber_deep=renumber_deep)
    alive: dict[str, tuple[RequestPlan | None, int, int]] = {}
    names = st.sampled_from("abcdef")
    for _ in range(data.draw(st.integers(1, 8))):
        for name in data.draw(
            st.sets(names, max_size=3)
        ):  # a new request, or one with another prompt
            plan, prompt = data.draw(prompts())
            planner.track(name, plan, prompt)
            alive[name] = plan, prompt, 0
        for name in data.draw(st.sets(names, max_size=1)):
            planner.remove(name)
            alive.pop(name, None)
        if not alive:
            continue
        order = data.draw(st.permutations(sorted(alive)))
        rows = order[: data.draw(st.integers(1, len(order)))]
        batch = []
        for name in rows:
            plan, prompt, computed = alive[name]
            spans = plan.spans if plan else ()
            cuts = [i for i in range(prompt + 9) if not any(s.offset < i < s.end for s in spans)]
            start = computed
            if data.draw(st.integers(0, 5)) == 0:  # preempted, then a cache hit of any length
                start = data.draw(st.sampled_from([i for i in cuts if i <= computed]))
            end = data.draw(st.sampled_from([i for i in cuts if i > start] or [start + 1]))
            batch.append(ScheduledRequest(plan, start, end, prompt))
            alive[name] = plan, prompt, end
        starts = np.array([request.start for request in batch], dtype=np.int32)
        ends = np.array([request.end for request in batch], dtype=np.int32)
        actual = planner.plan_step(rows, starts, ends)
        assert_same(actual, build_step(batch, renumber_deep=renumber_deep))


def test_decode_steps_do_not_loop_over_requests():
    counts = VisualTokenCounts(9, 2, (6, 4, 2))
    planner = StepPlanner(CPU)
    names = [str(number) for number in range(40)]
    for name in names:
        planner.track(name, RequestPlan((VisualSpan(1, counts),)), 8)
    starts = np.zeros(40, dtype=np.int32)
    planner.plan_step(names, starts, starts + 8)

    planner._requests.clear()  # a look-up would raise
    for length in (8, 9, 200):
        step = planner.plan_step(names, starts + length, starts + length + 1)
        assert step is not None
        assert step.forward is None
        lengths = step.segments[2]
        assert isinstance(lengths, DecodeView)
        assert lengths.missing.tolist() == [4] * 40


def test_unpruned_requests_take_no_slot_in_the_planner():
    planner = StepPlanner(CPU)
    planner.track("text", None, 5)
    assert not planner._slots
    assert planner.plan_step(["text"], np.array([0]), np.array([5])) is None


def test_planner_slots_are_reused():
    plan = RequestPlan((VisualSpan(0, VisualTokenCounts(9, 2, (6, 4, 2))),))
    planner = StepPlanner(CPU)
    for round_number in range(50):
        planner.track(str(round_number), plan, 8)
        planner.track("same", plan, 8)
        planner.remove(str(round_number - 1))
    assert planner._until.shape[0] <= 8
    planner.remove("never seen")


@pytest.mark.parametrize("pruned", [0, 1])
def test_images_of_a_step_are_listed_in_row_order(pruned):
    counts = VisualTokenCounts(9, 2, (6, 4, 2))
    mild = VisualTokenCounts(9, 0, (6, 6, 6))
    whole = VisualTokenCounts.unpruned(6)
    planner = StepPlanner(CPU)
    first = RequestPlan((VisualSpan(0, whole), VisualSpan(6, counts)))
    second = RequestPlan((VisualSpan(0, mild), VisualSpan(6, counts)))
    planner.track("one", first, 13, ["w", "a"])
    planner.track("two", second, 13, ["b", "c"])
    ends = np.array([13, 13])
    step = planner.plan_step(["two", "one"], np.array([0, 6 * pruned]), ends)
    assert step is not None
    assert step.forward is not None
    assert step.forward.images == (("b", 6), ("c", 6), ("a", 6))
    (group,) = step.forward.groups
    assert group.images == (1, 2)


def test_tokens_after_the_frames_of_a_video_have_no_name_and_move_no_name():
    counts = VisualTokenCounts(9, 2, (6, 4, 2))
    planner = StepPlanner(CPU)

    def feature(identifier: str, first: int, last: int) -> Any:
        place = SimpleNamespace(extract_embeds_range=lambda: [(first, last)])
        return SimpleNamespace(identifier=identifier, mm_position=place)

    video, image = tag_identifier("v", counts, 2, tail=1), tag_identifier("i", counts)
    planner.add("r", [feature(video, 1, 13), feature(image, 14, 19)], 21)
    step = planner.plan_step(["r"], np.array([0]), np.array([21]))
    assert step is not None
    assert step.forward is not None
    names = [*frame_names(video, 2), image]
    assert step.forward.images == tuple((name, 6) for name in names)
    (group,) = step.forward.groups
    assert group.first_rows.tolist() == [[1, 7, 14], [1, 5, 10], [1, 3, 6]]
