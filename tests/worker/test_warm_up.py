"""At start-up, the engine runs one staged step and keeps no state of it."""

from typing import Any

import pytest
import torch
from vllm.forward_context import set_forward_context

from tests.engine.requests import ENGINE_OPTIONS, RequestSpec, generate
from tests.engine.scheduling import engine_core
from vitcop_vllm.pruning.plan import NUM_SEGMENTS
from vitcop_vllm.worker.warm_up import run_staged_step

pytestmark = pytest.mark.slow

STEP_TOKENS = ENGINE_OPTIONS["max_num_batched_tokens"]


@pytest.fixture
def worker(llm):
    return engine_core(llm).model_executor.driver_worker.worker


@pytest.fixture
def staged(worker, monkeypatch):
    """A list that receives (step, number of embedding rows) of every later staged forward."""
    model = worker.model_runner.get_model()
    decoder, calls = model.staged_decoder, []

    def recording(step, positions, inputs_embeds, *args):
        calls.append((step, inputs_embeds.shape[0]))
        return decoder(step, positions, inputs_embeds, *args)

    monkeypatch.setattr(model, "staged_decoder", recording)
    return calls


def test_start_up_ran_the_encoder_and_the_segments(worker):
    model = worker.model_runner.get_model()
    assert model._encoder_ran
    assert model._segments_ran


def test_the_warm_up_step_has_the_maximum_size_and_leaves_no_state(llm, worker, staged):
    spec = RequestSpec("What is it?", (1,), 8 / 9)
    before = generate(llm, [spec])
    staged.clear()
    runner, scheduler = worker.model_runner, engine_core(llm).scheduler
    encoded, pool = set(runner.encoder_cache), scheduler.kv_cache_manager.block_pool
    num_free = pool.get_num_free_blocks()

    run_staged_step(worker)

    ((step, rows),) = staged
    (group,) = step.groups
    n1 = group.counts.stages[0]
    assert rows <= STEP_TOKENS < rows + n1 + 4
    assert len(group.images) == rows // n1
    assert not any(name.startswith("warm-up") for name in runner.requests)
    assert set(runner.encoder_cache) == encoded
    assert pool.get_num_free_blocks() == num_free
    assert generate(llm, [spec])[0].tokens == before[0].tokens


def test_warm_up_requests_have_distinct_blocks_inside_the_cache(worker, monkeypatch):
    steps: list[Any] = []
    monkeypatch.setattr(worker, "execute_model", steps.append)
    monkeypatch.setattr(worker, "sample_tokens", lambda grammar: None)
    run_staged_step(worker)
    step, clean_up = steps
    blocks = [b for new in step.scheduled_new_reqs for group in new.block_ids for b in group]
    assert len(set(blocks)) == len(blocks)
    assert min(blocks) == 1  # 0 is vLLM's null block
    assert max(blocks) < worker.model_runner.kv_cache_config.num_blocks
    assert clean_up.finished_req_ids == set(step.num_scheduled_tokens)


def test_the_warm_up_is_skipped_if_the_cache_is_too_small_for_an_image(worker, monkeypatch):
    monkeypatch.setattr(worker.model_runner.kv_cache_config, "num_blocks", 5)
    monkeypatch.setattr(worker, "execute_model", lambda step: pytest.fail("a step ran"))
    run_staged_step(worker)


def test_vllm_s_memory_profile_runs_the_stages_on_a_step_of_maximum_size(llm, worker, staged):
    model = worker.model_runner.get_model()
    model._segments_ran = False
    embeds = torch.zeros(STEP_TOKENS, model.config.text_config.hidden_size)
    positions = torch.zeros(STEP_TOKENS, dtype=torch.int64)
    for _ in range(2):  # the second forward runs no segments
        with (
            torch.inference_mode(),
            set_forward_context(None, llm.llm_engine.vllm_config, num_tokens=STEP_TOKENS),
        ):
            hidden = model(None, positions, inputs_embeds=embeds)
    assert hidden.shape == embeds.shape
    ((step, rows),) = staged
    assert rows <= STEP_TOKENS < rows + step.groups[0].counts.stages[0]
    assert len(step.sources) == NUM_SEGMENTS - 1


def test_vllm_s_memory_profile_encodes_pruned_images(worker, monkeypatch):
    runner = worker.model_runner
    model = runner.get_model()
    calls = []
    embed_pruned = model._embed_pruned

    def recording(pixels, images, *others):
        calls.append(images)
        return embed_pruned(pixels, images, *others)

    monkeypatch.setattr(model, "_embed_pruned", recording)
    model._encoder_ran = False
    batch = runner._get_mm_dummy_batch("image", 1)
    for _ in range(2):  # the second call encodes no pruned images
        with torch.inference_mode():
            (whole,) = model.embed_multimodal(**batch)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert whole.shape[0] == side * side
    ((shape,),) = calls
    assert shape.counts.is_pruned
