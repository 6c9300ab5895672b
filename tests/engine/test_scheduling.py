"""Prompts are chunked; a picture's span never is."""

import pytest

from tests.engine.requests import Ask, generate
from vitcop_vllm.engine.scheduler import StagedScheduler


@pytest.fixture
def chunks(llm, monkeypatch):
    """(request's plan, tokens before, tokens after) of every chunk scheduled."""
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
    asks = [
        Ask("x" * (17 * i), tuple(range(i, i + 1 + i % 3)), ratio, max_tokens=6)
        for i, ratio in enumerate([0.5, 2 / 3, 0.3, 8 / 9, 0.5, 7 / 9, 0.4, 2 / 3])
    ]
    generate(llm, asks)
    split = 0
    for plan, start, end, prompt in chunks:
        split += 0 < start < prompt
        for span in plan.spans if plan else ():
            assert not start < span.end <= prompt or start <= span.offset
            assert not span.offset < end < span.end
    assert split > 0, "no prompt was chunked: nothing was tested"


def test_a_budget_too_small_for_a_picture_is_refused_at_start_up(checkpoint):
    from vllm import LLM

    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        LLM(str(checkpoint), max_num_batched_tokens=200, max_model_len=1024, enforce_eager=True)
