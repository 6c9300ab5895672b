"""Adapter to vLLM's V1 model runner; ``cpu_runner`` has the one for CPUs."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vitcop_vllm.engine.kv_cache import segments_of_groups
from vitcop_vllm.engine.output import StagedSchedulerOutput
from vitcop_vllm.worker.adapter import StepAdapter
from vitcop_vllm.worker.block_tables import StagedBlockTables
from vitcop_vllm.worker.encoder_runner import StageOneModelRunner


class StagedModelRunner(StageOneModelRunner):
    """vLLM's V1 model runner. It gives each step's plan to attention, block tables and model."""

    @cached_property  # not in a constructor: the runner may be adopted
    def step_adapter(self) -> StepAdapter:
        """Plans the steps; the same for both model runners."""
        return StepAdapter(self.model_config, self.device, self.sink)

    def may_reinitialize_input_batch(self, kv_cache_config: KVCacheConfig) -> None:
        super().may_reinitialize_input_batch(kv_cache_config)
        StagedBlockTables.adopt(self.input_batch.block_table, segments_of_groups(kv_cache_config))

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        corrections = super()._update_states(scheduler_output)
        for name in scheduler_output.finished_req_ids:
            self.step_adapter.planner.remove(name)
        # Also known requests to which a streaming session has added images.
        for new in scheduler_output.scheduled_new_reqs:
            state = self.requests[new.req_id]
            self.step_adapter.planner.add(new.req_id, state.mm_features, state.num_prompt_tokens)
        return corrections

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        names = self.input_batch.req_ids
        starts = self.input_batch.num_computed_tokens_cpu[: len(names)]
        scheduled = map(scheduler_output.num_scheduled_tokens.__getitem__, names)
        counts = np.fromiter(scheduled, np.int64, len(names))
        # Before super, which computes the slots.
        self.step_adapter.plan(names, starts, starts + counts)
        self.input_batch.block_table.rows = self.step_adapter.segments
        return super()._prepare_inputs(scheduler_output, *args, **kwargs)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        self.step_adapter.begin_builds(self._attn_group_iterator())
        return super()._build_attention_metadata(*args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (staged := self.step_adapter.take_forward_arguments()):
            return super()._model_forward(*args, **kwargs)
        # The model itself: vLLM's graph wrappers around it would replay an unstaged forward.
        return self.get_model()(*args, **kwargs, **staged)

    def _execute_mm_encoder(self, scheduler_output: SchedulerOutput) -> list[torch.Tensor]:
        if isinstance(scheduler_output, StagedSchedulerOutput):
            self._complete_features(scheduler_output)
        return super()._execute_mm_encoder(scheduler_output)

    def _complete_features(self, scheduler_output: StagedSchedulerOutput) -> None:
        for name, items in scheduler_output.image_data.items():
            features = self.requests[name].mm_features
            for i, item in items.items():
                # Of models with M-RoPE, vLLM strips all fields but those on the host.
                features[i] = replace(features[i], data=item)
