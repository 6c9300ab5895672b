"""Scheduling for a selector that reads the question: one step must hold the whole prompt.

The tests drive the scheduler without a worker.
"""

from copy import copy
from functools import partial

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.requests import RequestSpec
from tests.engine.scheduling import add_request, free_blocks, new_scheduler, one_step
from vitcop_vllm.pruning.settings import CONFIG_KEY, PruningSettings

BUDGET = 700

SETTINGS = PruningSettings(selector="fastv", max_pruning_ratio=0.875)


@pytest.fixture
def fastv_processor(llm):
    """Replaces the processor's settings, from which a request's counts are computed."""
    info = llm.llm_engine.renderer.mm_processor.info
    before = info.settings
    vars(info)["settings"] = SETTINGS
    yield
    vars(info)["settings"] = before


@pytest.fixture
def scheduler(llm, fastv_processor):
    config = copy(llm.llm_engine.vllm_config)
    config.model_config = copy(config.model_config)
    config.model_config.hf_config = copy(config.model_config.hf_config)
    setattr(config.model_config.hf_config, CONFIG_KEY, SETTINGS.model_dump(mode="json"))
    config.cache_config = copy(config.cache_config)
    config.cache_config.enable_prefix_caching = False  # as start-up does for this selector
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.max_num_batched_tokens = BUDGET
    config.scheduler_config.max_num_scheduled_tokens = BUDGET
    config.scheduler_config.max_num_encoder_input_tokens = BUDGET
    config.scheduler_config.encoder_cache_size = BUDGET
    return new_scheduler(llm, config)


@pytest.fixture
def add(llm, scheduler):
    return partial(add_request, llm, scheduler)


def test_a_prompt_waits_until_a_step_holds_it(scheduler, add):
    before = free_blocks(scheduler)
    add("text", RequestSpec("x" * 500, max_tokens=3))
    add("read", RequestSpec("y" * 40, (1,), 0.8, max_tokens=2))
    add("unpruned", RequestSpec("z" * 40, (2,), 0.0, max_tokens=2))
    prompts = {name: request.num_prompt_tokens for name, request in scheduler.requests.items()}
    assert prompts["text"] + prompts["read"] > BUDGET
    first, second = one_step(scheduler), one_step(scheduler)
    # The scheduler keeps the order of arrival: no later prompt overtakes the waiting one.
    assert first == {"text": (0, prompts["text"])}
    assert second["read"] == (0, prompts["read"])
    assert second["unpruned"] == (0, prompts["unpruned"])
    while scheduler.has_unfinished_requests():
        one_step(scheduler)
    assert free_blocks(scheduler) == before


def test_a_waiting_prompt_holds_no_image_in_the_encoder_cache(scheduler, add):
    add("one", RequestSpec("a", (2,), 0.8, max_tokens=1))
    one_step(scheduler)
    manager = scheduler.encoder_cache_manager
    assert manager.freeable, "the image is cached, and no request refers to it"
    add("two", RequestSpec("b", (2, 3), 0.8, max_tokens=2))
    request = scheduler.requests["two"]
    # The budget does not hold the second image. vLLM would schedule the first one and the text.
    granted = scheduler._try_schedule_encoder_inputs(request, 0, request.num_tokens, 100)
    assert granted == ([], 0, 100, [], [])
    assert manager.freeable
    assert not manager.request_cached_ids.get("two")
    whole = request.num_prompt_tokens
    assert one_step(scheduler) == {"two": (0, whole)}
    one_step(scheduler)
    assert not scheduler.has_unfinished_requests()


def test_no_step_computes_a_part_of_the_prompt(scheduler, add):
    add("read", RequestSpec("question", (1,), 0.8))
    request = scheduler.requests["read"]
    length = request.num_prompt_tokens
    for tokens in range(1, length):
        assert scheduler._try_schedule_encoder_inputs(request, 0, tokens, 700)[1] == 0
    assert scheduler._try_schedule_encoder_inputs(request, 0, length, 700)[1] == length
    # A resumed request computes its answer tokens too, in the same step or in a later one.
    assert scheduler._try_schedule_encoder_inputs(request, 0, length + 5, 700)[1] == length + 5
    assert scheduler._try_schedule_encoder_inputs(request, length, 1, 700)[1] == 1
    scheduler.finish_requests("read", RequestStatus.FINISHED_ABORTED)


def test_a_session_s_new_turn_computes_its_whole_prompt_again(scheduler, add):
    """The prompt has a new last token, which selects the tokens of all images."""
    before = free_blocks(scheduler)
    add("talk", RequestSpec("one", (1,), 0.8, max_tokens=3), resumable=True)
    request = scheduler.requests["talk"]
    for _ in range(4):
        one_step(scheduler)
    computed = request.num_computed_tokens
    assert computed > 0
    add("talk", RequestSpec("two", (2,), 0.8, max_tokens=3), resumable=True)
    assert one_step(scheduler) == {"talk": (0, request.num_prompt_tokens)}
    assert request.num_prompt_tokens > computed + 256
    assert len(scheduler.plans["talk"].spans) == 2
    scheduler.finish_requests("talk", RequestStatus.FINISHED_ABORTED)
    assert free_blocks(scheduler) == before
