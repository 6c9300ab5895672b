"""Adapter to vLLM's V1 model runner; ``cpu_runner`` has the one for CPUs."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vitcop_vllm.engine.attention import begin_builds
from vitcop_vllm.engine.config import pruning_settings_of
from vitcop_vllm.engine.kv_cache import StagedAttentionSpec
from vitcop_vllm.engine.output import StagedSchedulerOutput
from vitcop_vllm.worker.block_tables import StagedBlockTables
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.planner import StepPlanner
from vitcop_vllm.worker.step import StagedStep


class StagedModelRunner(GPUModelRunner):
    """vLLM's V1 model runner, which tells the stages and the model what a step drops.

    Attributes:
        step: The step in progress; ``None`` where no request of it prunes.
    """

    step: StagedStep | None = None

    @cached_property
    def sink(self) -> SelectionSink:
        """Records selections for images that are to be explained."""
        return SelectionSink()

    @cached_property
    def _planner(self) -> StepPlanner:
        settings = pruning_settings_of(self.model_config.hf_config)
        return StepPlanner(self.device, renumber_deep=settings.positions == "reference")

    def may_reinitialize_input_batch(self, kv_cache_config: KVCacheConfig) -> None:
        super().may_reinitialize_input_batch(kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        stages = [spec.stage for spec in specs if isinstance(spec, StagedAttentionSpec)]
        assert len(stages) == len(specs)
        StagedBlockTables.adopt(self.input_batch.block_table, stages)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        corrections = super()._update_states(scheduler_output)
        for name in scheduler_output.finished_req_ids:
            self._planner.remove(name)
        # Also known requests to which a streaming session has added images.
        for new in scheduler_output.scheduled_new_reqs:
            state = self.requests[new.req_id]
            self._planner.add(new.req_id, state.mm_features, state.num_prompt_tokens)
        return corrections

    def _plan_step(self, num_scheduled_tokens: dict[str, int]) -> StagedStep | None:
        names = self.input_batch.req_ids
        starts = self.input_batch.num_computed_tokens_cpu[: len(names)]
        counts = np.fromiter(map(num_scheduled_tokens.__getitem__, names), np.int64, len(names))
        return self._planner.plan_step(names, starts, starts + counts)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # Before super, which computes the slots.
        self.step = self._plan_step(scheduler_output.num_scheduled_tokens)
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
        return self.get_model()(*args, **kwargs, step=self.step.forward, sink=self.sink)

    def _execute_mm_encoder(self, scheduler_output: SchedulerOutput) -> list[torch.Tensor]:
        if isinstance(scheduler_output, StagedSchedulerOutput):
            self._complete_features(scheduler_output)
        names, _, _ = self._batch_mm_inputs_from_scheduler(scheduler_output)
        with self.sink.attached_to(self.get_model(), names):
            return super()._execute_mm_encoder(scheduler_output)

    def _complete_features(self, scheduler_output: StagedSchedulerOutput) -> None:
        for name, items in scheduler_output.image_data.items():
            features = self.requests[name].mm_features
            for i, item in items.items():
                # Of models with M-RoPE, vLLM strips all fields but those on the host.
                features[i] = replace(features[i], data=item)
