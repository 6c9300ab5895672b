"""The scheduler splits prompts into chunks, but never inside the span of a pruned image."""

from copy import copy

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.requests import RequestSpec, generate
from tests.engine.scheduling import add_request, new_scheduler, one_step
from vitcop_vllm.engine.scheduler import StagedScheduler


@pytest.fixture
def chunks(llm, monkeypatch):
    """(plan, tokens before, tokens after, prompt tokens) of every scheduled chunk."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, StagedScheduler)
    seen = []
    schedule = scheduler.schedule

    def recording(*args, **kwargs):
        before = {name: r.num_computed_tokens for name, r in scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            plan = scheduler.plans.get(name)
            start = before[name]
            seen.append((plan, start, start + count, scheduler.requests[name].num_prompt_tokens))
        return output

    monkeypatch.setattr(scheduler, "schedule", recording)
    return seen


def test_no_chunk_cuts_a_span(llm, chunks):
    specs = [
        RequestSpec("x" * (17 * i), tuple(range(i, i + 1 + i % 3)), ratio, max_tokens=6)
        for i, ratio in enumerate([0.5, 2 / 3, 0.3, 8 / 9, 0.5, 7 / 9, 0.4, 2 / 3])
    ]
    generate(llm, specs)
    split = 0
    for plan, start, end, prompt in chunks:
        split += 0 < start < prompt
        for span in plan.spans if plan else ():
            assert not start < span.end <= prompt or start <= span.offset
            assert not span.offset < end < span.end
    assert split > 0, "no prompt was chunked"


def test_an_unpruned_image_is_computed_in_chunks_beside_a_pruned_one(llm):
    config = copy(llm.llm_engine.vllm_config)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.max_num_scheduled_tokens = 200  # an image has 256
    scheduler = new_scheduler(llm, config)
    add_request(llm, scheduler, "whole", RequestSpec("one", (91,), 0.0, max_tokens=1))
    add_request(llm, scheduler, "pruned", RequestSpec("two", (92,), 0.5, max_tokens=1))
    (span,) = scheduler.plans["pruned"].spans
    steps = [one_step(scheduler) for _ in range(3)]
    assert steps[0] == {"whole": (0, 200)}
    assert steps[1]["pruned"] == (0, span.offset), (
        "the pruned image fitted into the rest of the step"
    )
    assert steps[2]["pruned"][1] >= span.end


def test_an_unpruned_image_of_a_session_is_scheduled_after_a_strongly_pruned_one(llm):
    config = copy(llm.llm_engine.vllm_config)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.max_num_scheduled_tokens = 400
    config.scheduler_config.max_num_encoder_input_tokens = 400
    scheduler = new_scheduler(llm, config)
    add_request(
        llm, scheduler, "talk", RequestSpec("one", (91,), 0.94, max_tokens=2), resumable=True
    )
    for _ in range(3):
        one_step(scheduler)
    add_request(
        llm, scheduler, "talk", RequestSpec("two", (92,), 0.0, max_tokens=2), resumable=True
    )
    request = scheduler.requests["talk"]
    patches, placeholders = scheduler.plans["talk"].patches_per_placeholder
    assert 400 * placeholders // patches < scheduler.plans["talk"].largest_item
    for _ in range(3):
        one_step(scheduler)
    assert request.num_computed_tokens >= request.num_prompt_tokens
    scheduler.finish_requests("talk", RequestStatus.FINISHED_ABORTED)
