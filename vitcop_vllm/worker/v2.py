"""Adapter to vLLM's model runner V2, which is vLLM's own and asks the model for it."""

from collections.abc import Sequence
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vitcop_vllm.engine.kv_cache import segments_of_groups
from vitcop_vllm.worker.adapter import StepAdapter
from vitcop_vllm.worker.explain import SelectionSink


class StagedModelState(DefaultModelState):
    """vLLM's state of a model. It gives each step's plan to attention, block tables and model.

    Attributes:
        step_adapter: Plans the steps; the same for both model runners.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.step_adapter = StepAdapter(self.model_config, device, SelectionSink())
        # Images of requests that left since the encoder ran last.
        self._left: dict[str, list[MultiModalFeatureSpec]] = {}
        self._segment_tables: dict[int, BlockTables] = {}

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        segments = segments_of_groups(kv_cache_config)
        self._segment_tables = {
            segment: _tables_of_segment(block_tables, segments, segment)
            for segment in set(segments) - {0}
        }

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.step_adapter.planner.add(
            new_req_data.req_id, new_req_data.mm_features, new_req_data.prompt_len
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.step_adapter.planner.remove(req_id)
        if self.supports_mm_inputs and (left := self.encoder_cache.mm_features.get(req_id)):
            self._left[req_id] = left

    def execute_mm_encoder(self, scheduled_encoder_inputs: dict[str, list[int]]) -> None:
        # A request that was preempted in the step that was to encode its images is none of
        # vLLM's any more, but its images are counted on; see StagedScheduler.
        features = self.encoder_cache.mm_features
        away = scheduled_encoder_inputs.keys() - features.keys()
        features.update((name, self._left[name]) for name in away)
        self._left.clear()
        names, _ = self.encoder_runner.prepare_mm_inputs(scheduled_encoder_inputs)
        with self.step_adapter.sink.attached_to(self.model, names):
            super().execute_mm_encoder(scheduled_encoder_inputs)
        for name in away:
            self.encoder_cache.remove_request(name)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # Batches of warm-ups and captures have requests that were never added.
        starts = input_batch.num_computed_tokens_np[: input_batch.num_reqs]
        ends = starts + input_batch.num_scheduled_tokens[: input_batch.num_reqs]
        step = self.step_adapter.plan(input_batch.req_ids, starts, ends)
        # Prefill has no full graphs; see StagedBuilder.get_cudagraph_support.
        assert cudagraph_mode != CUDAGraphMode.FULL or not step or not step.forward
        self.step_adapter.begin_builds(chain.from_iterable(attn_groups))
        for segment, rows in self.step_adapter.segments.items():
            # vLLM has computed slots for rows that all segments have. By its own means again,
            # into the same place.
            query_start_loc, positions = rows.slot_inputs(
                input_batch.query_start_loc[: input_batch.num_reqs + 1],
                input_batch.positions[: input_batch.num_tokens],
            )
            self._segment_tables[segment].compute_slot_mappings(
                input_batch.idx_mapping, query_start_loc, positions, positions.shape[0]
            )
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            *args,
            **kwargs,
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs | self.step_adapter.take_forward_arguments()


def _tables_of_segment(tables: BlockTables, segments: Sequence[int], segment: int) -> BlockTables:
    """``tables`` restricted to the groups of one segment; both share their storage.

    Args:
        tables: Of G groups.
        segments: (G,) segment of each group.
        segment: One of them.

    Raises:
        ValueError: If groups of another segment lie between those of this one.
    """
    count = segments.count(segment)
    groups = slice(first := segments.index(segment), first + count)
    if set(segments[groups]) != {segment}:
        raise ValueError(f"KV cache groups of segment {segment} do not lie together: {segments}")
    part = copy(tables)
    part.num_kv_cache_groups = count
    part.slot_mappings = tables.slot_mappings[groups]
    for name in (
        "block_table_ptrs",
        "block_table_strides",
        "block_sizes_tensor",
        "slot_mapping_enabled",
        "dcp_sharded",
    ):
        # A copy begins where vLLM's own does, in memory: Triton compiles for that.
        setattr(part, name, getattr(tables, name)[groups].clone())
    return part
