"""Helpers that drive a real scheduler without a worker."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from tests.engine.requests import RequestSpec, model_type
from vitcop_vllm.engine.scheduler import create_scheduler


def engine_core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def free_blocks(scheduler: Any) -> int:
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def start(engine: Any, name: str, spec: RequestSpec) -> None:
    """Add a request to an engine that the test steps."""
    (prompt,) = engine.renderer.render_cmpl([spec.prompt(model_type(engine))])
    engine.add_request(name, prompt, spec.sampling_params(), priority=spec.priority)


def new_scheduler(llm: LLM, config: VllmConfig, cache: KVCacheConfig | None = None) -> Any:
    """A new scheduler. ``cache`` defaults to the engine's KV cache configuration."""
    core = engine_core(llm)
    return create_scheduler(
        vllm_config=config,
        kv_cache_config=cache or core.scheduler.kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=core.scheduler.block_size,
        hash_block_size=core.scheduler.hash_block_size,
    )


def recorded_steps(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[SchedulerOutput]:
    """A list that receives every later output of the scheduler."""
    steps: list[SchedulerOutput] = []
    schedule = scheduler.schedule

    def recording(*args: Any, **kwargs: Any) -> SchedulerOutput:
        steps.append(schedule(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(scheduler, "schedule", recording)
    return steps


def recorded_ends(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives, at every later step, how many tokens of each request are computed."""
    ends: list[int] = []
    schedule = scheduler.schedule

    def recording(*args: Any, **kwargs: Any) -> SchedulerOutput:
        output: SchedulerOutput = schedule(*args, **kwargs)
        ends.extend(scheduler.requests[n].num_computed_tokens for n in output.num_scheduled_tokens)
        return output

    monkeypatch.setattr(scheduler, "schedule", recording)
    return ends


def tokens_after_preemption(llm: LLM) -> list[int]:
    """Preempt the last running request, empty all caches, and give the request's answer."""
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    assert llm.reset_prefix_cache()
    engine.reset_encoder_cache()
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
    return list(outputs[0].outputs[0].token_ids)


def decoding_steps(llm: LLM) -> Iterator[Request]:
    """Run the engine's only request, and give it after each step that has computed its prompt."""
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    while engine.has_unfinished_requests():
        (request,) = scheduler.requests.values()
        engine.step()
        if not request.is_finished() and request.num_computed_tokens >= request.num_prompt_tokens:
            yield request


def new_request(llm: LLM, name: str, spec: RequestSpec, **options: Any) -> Request:
    """The request that the engine would pass to its scheduler."""
    engine = llm.llm_engine
    (prompt,) = engine.renderer.render_cmpl([spec.prompt(model_type(engine))])
    request = engine.input_processor.process_inputs(
        name, prompt, spec.sampling_params(), supported_tasks=("generate",), **options
    )
    return engine_core(llm).preprocess_add_request(request)[0]


def add_request(llm: LLM, scheduler: Any, name: str, spec: RequestSpec, **options: Any) -> None:
    """Add a request to a scheduler as the engine does."""
    scheduler.add_request(new_request(llm, name, spec, **options))


def result_of(scheduler: Any, scheduled: Any) -> ModelRunnerOutput:
    """A runner's output with token 77 for each request whose prompt is computed."""
    names = list(scheduled.num_scheduled_tokens)
    requests = [scheduler.requests[name] for name in names]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[
            [77] if request.num_computed_tokens >= request.num_prompt_tokens else []
            for request in requests
        ],
    )


def one_step(scheduler: Any) -> dict[str, tuple[int, int]]:
    """Run one step. Returns request -> tokens computed before and after it."""
    scheduled = scheduler.schedule()
    chunks = {}
    for name, count in scheduled.num_scheduled_tokens.items():
        after = scheduler.requests[name].num_computed_tokens
        chunks[name] = after - count, after
    if chunks:
        scheduler.update_from_output(scheduled, result_of(scheduler, scheduled))
    return chunks
