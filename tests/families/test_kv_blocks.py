"""A running request holds exactly the plan's KV blocks; a finished request holds none."""

from contextlib import contextmanager
from math import ceil

import pytest

from tests.engine.requests import BLOCK, RequestSpec, generate
from tests.engine.scheduling import decoding_steps, free_blocks, start
from vitcop_vllm.engine.kv_cache import StagedAttentionSpec


@pytest.fixture
def engine(llm):
    return llm.llm_engine


@pytest.fixture
def scheduler(engine):
    return engine.engine_core.engine_core.scheduler


@pytest.fixture(autouse=True)
def _every_block_comes_back(scheduler):
    before = free_blocks(scheduler)
    yield
    assert free_blocks(scheduler) == before
    assert not scheduler.plans
    assert not scheduler.requests
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not any(manager.req_to_blocks for manager in managers)


def held_blocks(scheduler) -> dict[str, dict[int, set[int]]]:
    """Request -> segment -> block counts of the segment's groups, without null blocks."""
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    held: dict[str, dict[int, set[int]]] = {}
    for name in scheduler.requests:
        blocks = scheduler.kv_cache_manager.get_blocks(name).blocks
        held[name] = {}
        for group, group_blocks in zip(groups, blocks, strict=True):
            spec = group.kv_cache_spec
            assert isinstance(spec, StagedAttentionSpec)
            count = sum(not block.is_null for block in group_blocks)
            held[name].setdefault(spec.segment, set()).add(count)
    return held


def needed_blocks(family, scheduler, spec: RequestSpec, tokens: int) -> int:
    """Blocks that the plan needs for a request's first ``tokens``, all its images included."""
    plans = [family.counts(spec.ratio or 0.0, image) for image in spec.images]
    return sum(
        ceil((tokens - sum(plan.dropped[group.kv_cache_spec.segment] for plan in plans)) / BLOCK)
        for group in scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    )


def run(engine, steps: int = 1000):
    while engine.has_unfinished_requests() and steps:
        engine.step()
        steps -= 1


@contextmanager
def only_blocks(scheduler, count: int):
    """Empty the prefix cache and leave ``count`` free blocks, too few for several requests."""
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.reset_prefix_cache()
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        pool.free_blocks(taken)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 2 / 3, 7 / 9, 8 / 9])
@pytest.mark.parametrize("images", [(1,), (101, 4, 105)])
def test_a_running_request_holds_the_plan_s_blocks_in_every_stage(
    family, llm, engine, scheduler, ratio, images
):
    plans = [family.counts(ratio, image) for image in images]
    start(engine, "r", RequestSpec("How many?", images, ratio, max_tokens=40))
    seen = 0
    for request in decoding_steps(llm):
        seen += 1
        (held,) = held_blocks(scheduler).values()
        for segment, dropped in enumerate(zip(*(plan.dropped for plan in plans), strict=True)):
            assert held[segment] == {ceil((request.num_computed_tokens - sum(dropped)) / BLOCK)}
    assert seen > 30


def test_a_text_request_holds_equally_many_blocks_in_every_stage(engine, scheduler):
    start(engine, "r", RequestSpec("words " * 30, max_tokens=5))
    for _ in range(2):
        engine.step()
    (held,) = held_blocks(scheduler).values()
    assert len(set.union(*held.values())) == 1
    run(engine)


def test_every_group_holds_layers_of_one_stage(family, scheduler):
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    shallow, deep = family.boundaries
    for group in groups:
        spec = group.kv_cache_spec
        assert isinstance(spec, StagedAttentionSpec)
        for name in group.layer_names:
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert spec.segment == (layer >= shallow) + (layer >= deep)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_frees_its_blocks(engine, steps):
    start(engine, "gone", RequestSpec("How many?", (1, 2), 8 / 9, max_tokens=50))
    start(engine, "stays", RequestSpec("How many?", (3,), 2 / 3, max_tokens=8))
    for _ in range(steps):
        engine.step()
    engine.abort_request(["gone"])
    run(engine)


def test_preempted_requests_resume_and_answer_as_if_alone(family, llm, scheduler):
    specs = [
        RequestSpec(
            "Count the " + "very " * i + "small things.", (i, 104 + i % 3), ratio, max_tokens=60
        )
        for i, ratio in enumerate([8 / 9, 2 / 3, 7 / 9, 8 / 9], start=1)
    ]
    answers = [generate(llm, [spec])[0] for spec in specs]
    alone = [answer.tokens for answer in answers]
    needed = [
        needed_blocks(family, scheduler, spec, len(answer.prompt) + spec.max_tokens)
        for spec, answer in zip(specs, answers, strict=True)
    ]
    preemptions = 0
    preempt = scheduler._preempt_request

    def counted(*args, **kwargs):
        nonlocal preemptions
        preemptions += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    try:
        with only_blocks(scheduler, max(max(needed), sum(needed) // 2)):
            together = [answer.tokens for answer in generate(llm, specs, reuse=True)]
    finally:
        del scheduler._preempt_request
    assert preemptions > 0
    assert together == alone


@pytest.mark.parametrize("ratio", [0.0, 8 / 9])
def test_as_many_requests_run_at_once_as_the_plan_says(family, engine, scheduler, ratio):
    """Dropped tokens take no memory, so more requests fit."""
    groups = scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
    budget, answer = 25 * len(groups), 30
    spec = RequestSpec("What?", (106,), ratio, max_tokens=answer)
    start(engine, "probe", spec)
    (request,) = scheduler.requests.values()
    fit = budget // needed_blocks(family, scheduler, spec, request.num_prompt_tokens + answer)
    assert fit >= (6 if ratio else 2)
    with only_blocks(scheduler, budget):
        for i in range(11):
            start(engine, f"r{i}", spec)
        max_running = 0
        while engine.has_unfinished_requests():
            engine.step()
            max_running = max(max_running, len(scheduler.running))
    assert max_running >= fit
