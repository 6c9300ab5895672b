"""Adapter to vLLM's V1 model runner; ``cpu_runner`` has the one for CPUs."""

from functools import cached_property
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vitcop_vllm.engine.attention import begin_builds
from vitcop_vllm.engine.config import settings_of
from vitcop_vllm.engine.kv_cache import StagedAttentionSpec
from vitcop_vllm.pruning.identity import plan_request
from vitcop_vllm.pruning.plan import RequestPlan
from vitcop_vllm.worker.block_tables import StagedBlockTables
from vitcop_vllm.worker.explain import ChoiceRecorder
from vitcop_vllm.worker.step import ScheduledRequest, StagedStep, build_step


class StagedModelRunner(GPUModelRunner):
    """vLLM's V1 model runner, which tells the stages and the model what a step drops.

    Attributes:
        step: The step in progress; ``None`` where no request of it prunes.
    """

    step: StagedStep | None = None

    @cached_property
    def choices(self) -> ChoiceRecorder:
        """What was chosen for pictures that are to be explained."""
        return ChoiceRecorder()

    @cached_property
    def _renumber_deep(self) -> bool:
        settings = settings_of(self.model_config.hf_config)
        return settings.positions == "reference"

    def may_reinitialize_input_batch(self, kv_cache_config: KVCacheConfig) -> None:
        super().may_reinitialize_input_batch(kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        stages = [spec.stage for spec in specs if isinstance(spec, StagedAttentionSpec)]
        assert len(stages) == len(specs)
        batch = self.input_batch
        batch.block_table = StagedBlockTables.adopt(batch.block_table, stages)

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
                    self.requests[request_id].mm_features,
                )
            )
        step = build_step(requests, self.device, renumber_deep=self._renumber_deep)
        return self.choices.follow(step, requests)

    def _prepare_inputs(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Before super, which computes the slots.
        self.step = self._begin_step(scheduler_output.num_scheduled_tokens)
        self.input_batch.block_table.rows = self.step.stages if self.step else {}
        return super()._prepare_inputs(scheduler_output, *args, **kwargs)

    def _build_attention_metadata(
        self, *args: Any, num_scheduled_tokens: dict[str, int] | None = None, **kwargs: Any
    ) -> Any:
        if not num_scheduled_tokens:
            self.step = None  # a warm-up or profiling run, which has no requests
        begin_builds(self._attn_group_iterator(), self.step.stages if self.step else {})
        return super()._build_attention_metadata(
            *args, num_scheduled_tokens=num_scheduled_tokens, **kwargs
        )

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.step is None or self.step.forward is None:
            return super()._model_forward(*args, **kwargs)
        # The model itself: vLLM's graph wrappers around it would replay an unstaged forward.
        return self.get_model()(*args, **kwargs, step=self.step.forward)

    def _execute_mm_encoder(self, scheduler_output: Any) -> list[torch.Tensor]:
        names, _, _ = self._batch_mm_inputs_from_scheduler(scheduler_output)
        with self.choices.follow_encoder(self.get_model(), names):
            return super()._execute_mm_encoder(scheduler_output)
