"""The asynchronous scheduler, which vLLM uses on GPUs and disables on CPUs.

The tests drive it without a worker: they schedule each step before the previous step's result
arrives, and check blocks and plans.
"""

from collections import deque
from copy import copy
from functools import partial
from math import ceil
from typing import Any

import pytest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.engine.requests import BLOCK, RequestSpec
from tests.engine.scheduling import add_request, free_blocks, new_scheduler, result_of
from vitcop_vllm.engine.kv_cache import StagedKVCacheManager
from vitcop_vllm.engine.scheduler import StagedAsyncScheduler

REQUESTS = [
    RequestSpec("How many?", (1,), 8 / 9, max_tokens=40),
    RequestSpec("x" * 50, (2, 3), 2 / 3, max_tokens=25),
    RequestSpec("unpruned", (4,), 0.0, max_tokens=33),
    RequestSpec("no image " * 40, max_tokens=12),
    RequestSpec("y" * 70, (5, 6, 7), 0.5, max_tokens=20),
]


@pytest.fixture
def scheduler(llm):
    config = copy(llm.llm_engine.vllm_config)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.async_scheduling = True
    return new_scheduler(llm, config)


@pytest.fixture
def add(llm, scheduler):
    return partial(add_request, llm, scheduler)


def check(scheduler, scheduled) -> None:
    """No chunk ends inside a span, and every segment holds the blocks of its slots."""
    for name in scheduled.num_scheduled_tokens:
        request = scheduler.requests[name]
        plan = scheduler.plans.get(name)
        for span in plan.spans if plan else ():
            assert not span.offset < request.num_computed_tokens < span.end
        blocks = scheduler.kv_cache_manager.get_blocks(name).blocks
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        for manager, held in zip(managers, blocks, strict=True):
            slots = request.num_computed_tokens
            if plan and isinstance(manager, StagedKVCacheManager):
                slots = plan.num_slots(slots, manager.segment)
            assert len(held) == ceil(slots / BLOCK)


def run(scheduler, *, abort: str | None = None) -> int:
    """Run all requests with two steps in flight. Returns the number of steps."""
    in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
    steps = 0
    while scheduler.has_unfinished_requests() or in_flight:
        scheduled = scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            check(scheduler, scheduled)
            in_flight.append((scheduled, result_of(scheduler, scheduled)))
            steps += 1
        if abort and steps == 5:
            scheduler.finish_requests(abort, RequestStatus.FINISHED_ABORTED)
            abort = None
        if len(in_flight) == 2 or not scheduled.total_num_scheduled_tokens:
            scheduler.update_from_output(*in_flight.popleft())
        assert steps < 2000
    return steps


@pytest.mark.parametrize("abort", [None, "0", "1"])
def test_blocks_follow_the_plans_with_two_steps_in_flight(scheduler, add, abort):
    assert isinstance(scheduler, StagedAsyncScheduler)
    before = free_blocks(scheduler)
    for i, spec in enumerate(REQUESTS):
        add(str(i), spec)
    assert set(scheduler.plans) == {"0", "1", "4"}
    assert run(scheduler, abort=abort) >= 33
    assert free_blocks(scheduler) == before
    assert not scheduler.plans


def test_a_preempted_request_keeps_its_plan(scheduler, add):
    pool = scheduler.kv_cache_manager.block_pool
    before = free_blocks(scheduler)
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 110)
    preempted = []
    preempt = scheduler._preempt_request

    def recorded(request, *args, **kwargs):
        preempted.append(request.request_id in scheduler.plans)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = recorded
    for i in range(4):
        add(str(i), RequestSpec("z" * 20, (i,), 2 / 3, max_tokens=120))
    run(scheduler)
    pool.free_blocks(taken)
    assert preempted
    assert all(preempted)
    assert free_blocks(scheduler) == before
