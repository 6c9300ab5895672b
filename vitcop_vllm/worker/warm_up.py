"""Runs one staged step before the first request, so that no request waits for compilation.

vLLM's own warm-up has no images. So it does not run the selections, the attention of segments (runs
of decoder layers) on fewer rows, or the encoder's last layer on fewer patches.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.multimodal import ImageDummyOptions
from vllm.logger import init_logger
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.processing.context import TimingContext
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vitcop_vllm.engine.checks import step_tokens
from vitcop_vllm.engine.config import pruning_settings_of, span_limit_of
from vitcop_vllm.engine.kv_cache import segments_of_groups
from vitcop_vllm.pruning.identity import plan_request
from vitcop_vllm.pruning.plan import dummy_ratio
from vitcop_vllm.pruning.settings import RATIO_KEY

logger = init_logger(f"vllm.{__name__}")


def run_staged_step(worker: Any) -> None:
    """Run a prefill of as many pruned images as a step holds, then remove its requests.

    All requests have the same image, so the encoder runs once. The step may write any KV block,
    because no other request exists yet.

    Args:
        worker: vLLM's worker, with weights loaded and KV cache allocated.
    """
    vllm_config: VllmConfig = worker.vllm_config
    if not (image := _pruned_image(vllm_config)):
        return
    prompt, feature = image
    kv_cache: KVCacheConfig = worker.model_runner.kv_cache_config
    blocks = _blocks_per_request(kv_cache, len(prompt), feature)
    scheduler = vllm_config.scheduler_config
    num_requests = min(
        step_tokens(scheduler) // len(prompt),
        scheduler.max_num_seqs,
        (kv_cache.num_blocks - 1) // sum(blocks),  # block 0 is vLLM's null block
    )
    if num_requests < 1:
        logger.warning(
            "Warm-up of visual token pruning is skipped, because one image does not fit into a "
            "step. The first requests will take longer."
        )
        return
    step, clean_up = _steps(prompt, feature, blocks, num_requests)
    worker.execute_model(step)
    worker.sample_tokens(None)
    worker.execute_model(clean_up)


def _pruned_image(vllm_config: VllmConfig) -> tuple[list[int], MultiModalFeatureSpec] | None:
    """The prompt of one pruned image and the processed image.

    ``None`` if no request can have a pruned image.
    """
    model_config = vllm_config.model_config
    ratio = dummy_ratio(
        pruning_settings_of(model_config.hf_config), model_config.hf_text_config.num_hidden_layers
    )
    if not ratio or model_config.skip_tokenizer_init:
        return None
    processor: Any = MULTIMODAL_REGISTRY.create_processor(model_config)
    if not processor.info.allowed_mm_limits.get("image"):
        return None
    options = dict(model_config.get_multimodal_config().limit_per_prompt)
    if size := processor.info.dummy_size(span_limit_of(model_config.hf_config)):
        options["image"] = ImageDummyOptions(width=size[0], height=size[1])
    inputs = processor.get_dummy_inputs(model_config.max_model_len, {"image": 1}, options)
    pruned = replace(inputs, hf_processor_mm_kwargs={RATIO_KEY: ratio})
    processed = processor.apply(pruned, timing_ctx=TimingContext(enabled=False))
    feature = MultiModalFeatureSpec(
        data=processed["mm_kwargs"]["image"][0],
        modality="image",
        identifier=processed["mm_hashes"]["image"][0],
        mm_position=processed["mm_placeholders"]["image"][0],
    )
    return processed["prompt_token_ids"], feature


def _blocks_per_request(
    kv_cache: KVCacheConfig, prompt_tokens: int, feature: MultiModalFeatureSpec
) -> list[int]:
    """KV blocks of each group for a prompt with this image and one more token."""
    plan = plan_request([feature])
    assert plan is not None
    blocks = []
    for group, segment in zip(kv_cache.kv_cache_groups, segments_of_groups(kv_cache), strict=True):
        slots = plan.num_slots(prompt_tokens, segment) + 1
        blocks.append(cdiv(slots, group.kv_cache_spec.block_size))
    return blocks


def _steps(
    prompt: list[int], feature: MultiModalFeatureSpec, blocks: Sequence[int], num_requests: int
) -> tuple[SchedulerOutput, SchedulerOutput]:
    """Two scheduler outputs: a step of equal requests, and a step that ends them."""
    names = [f"warm-up-{number}" for number in range(num_requests)]
    step = SchedulerOutput.make_empty()
    next_block = 1
    for name in names:
        block_ids = []
        for count in blocks:
            block_ids.append([*range(next_block, next_block + count)])
            next_block += count
        step.scheduled_new_reqs.append(
            NewRequestData(
                req_id=name,
                prompt_token_ids=prompt,
                mm_features=[feature],
                sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
                pooling_params=None,
                block_ids=tuple(block_ids),
                num_computed_tokens=0,
                lora_request=None,
                prefill_token_ids=prompt,
            )
        )
        step.num_scheduled_tokens[name] = len(prompt)
    step.total_num_scheduled_tokens = len(prompt) * num_requests
    step.scheduled_encoder_inputs[names[0]] = [0]

    clean_up = SchedulerOutput.make_empty()
    clean_up.finished_req_ids = {*names}
    clean_up.free_encoder_mm_hashes = [feature.identifier]
    return step, clean_up
