"""Adapter to vLLM's V1 model runner, on CPU and on GPU."""

from functools import cached_property
from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from vitcop_vllm.engine.attention import StagedMetadataBuilder
from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.kv_cache import StagedAttentionSpec
from vitcop_vllm.pruning.identity import plan_request
from vitcop_vllm.pruning.plan import RequestPlan
from vitcop_vllm.worker.step import ScheduledRequest, StagedStep, build_step, fill_slots


class StagedModelRunner(GPUModelRunner):
    """vLLM's V1 model runner, which tells the stages and the model what a step drops.

    Attributes:
        step: The step in progress; ``None`` where no request of it prunes.
    """

    step: StagedStep | None = None

    @cached_property
    def _renumber_deep(self) -> bool:
        settings = settings_of(self.model_config.hf_config)
        return settings.positions == "reference"

    @cached_property
    def _stage_of_group(self) -> list[int]:
        return [
            group.kv_cache_spec.stage if isinstance(group.kv_cache_spec, StagedAttentionSpec) else 0
            for group in self.kv_cache_config.kv_cache_groups
        ]

    def _plan_of(self, request_id: str) -> RequestPlan | None:
        # Kept with vLLM's own state of the request, whose life it shares; made again when
        # a streaming session has added pictures to it.
        state = self.requests[request_id]
        known, plan = getattr(state, "visual_plan", (None, None))
        if known != len(state.mm_features):
            plan = plan_request(state.mm_features)
            state.visual_plan = len(state.mm_features), plan
        return plan

    def _begin_step(self, num_scheduled_tokens: dict[str, int]) -> StagedStep | None:
        batch = self.input_batch
        plans = [self._plan_of(request_id) for request_id in batch.req_ids]
        if all(plan is None for plan in plans):
            return None
        requests = []
        for row, request_id in enumerate(batch.req_ids):
            start = int(batch.num_computed_tokens_cpu[row])
            requests.append(
                ScheduledRequest(
                    plans[row],
                    start,
                    start + num_scheduled_tokens[request_id],
                    int(batch.num_prompt_tokens[row]),
                )
            )
        return build_step(requests, self.device, renumber_deep=self._renumber_deep)

    def _build_attention_metadata(
        self, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        # Warm-up and profiling runs have no requests and name no scheduled tokens.
        step = self._begin_step(num_scheduled_tokens) if num_scheduled_tokens else None
        if step is not None:
            # Before super: it hands these tables' slots to the builders.
            fill_slots(step, self.input_batch.block_table, self._stage_of_group)
        for group in self._attn_group_iterator():
            builder = group.get_metadata_builder()
            if isinstance(builder, StagedMetadataBuilder):
                builder.rows = step.stages[builder.kv_cache_spec.stage] if step else None
        self.step = step
        return super()._build_attention_metadata(
            *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs
        )

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.step is None or self.step.forward is None:
            return super()._model_forward(*args, **kwargs)
        # The model itself: vLLM's graph wrappers around it would replay an unstaged forward.
        return self.get_model()(*args, **kwargs, step=self.step.forward)


class StagedCPUModelRunner(StagedModelRunner, CPUModelRunner):
    """The same for vLLM's CPU model runner.

    And with a seeded request whose prompt is chunked, which vLLM 0.32's dies of: to undo a
    sample it throws away it moves the generator's offset back, and CPU generators have
    none. We put their state back instead.
    """

    def _discarded_generators(self) -> dict[int, torch.Generator]:
        batch = self.input_batch
        discarded = self.discard_request_mask.np[: batch.num_reqs]
        return {row: g for row, g in batch.generators.items() if discarded[row]}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        before = [(g, g.get_state()) for g in self._discarded_generators().values()]
        sampled = super()._sample(*args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return sampled

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        restored = self._discarded_generators()
        for row in restored:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(restored)


class StagedGPUWorker(GPUWorker):
    """vLLM's GPU worker with the staged model runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        assert not self.use_v2_model_runner
        return StagedModelRunner(self.vllm_config, self.device)


class StagedCPUWorker(CPUWorker):
    """vLLM's CPU worker with the staged model runner."""

    def init_device(self) -> None:
        super().init_device()
        # vLLM makes its runner inside init_device, without a seam. Ours adds methods and
        # nothing to construct, so the finished runner may become one.
        self.model_runner.__class__ = StagedCPUModelRunner
