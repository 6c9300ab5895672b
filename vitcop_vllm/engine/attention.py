"""Attention of a stage, over whichever backend vLLM picked.

The shape follows vLLM's own variants (chunked-local, cross attention): a factory that
subclasses the backend's metadata builder and implementation, and a thin layer.
"""

import functools
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from vitcop_vllm.engine.kv_cache import StagedAttentionSpec

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends whose metadata holds the block table and the slots as plain fields. Others plan
kernels from them while building, so that groups of a stage could not share a build."""


@dataclass(frozen=True)
class StageRows:
    """A step's rows in one stage; R requests, T rows.

    Attributes:
        query_start_loc, query_start_loc_cpu: (R + 1,) int32, first row of each request.
        seq_lens, seq_lens_cpu: (R,) int32, physical length of each request after the step.
        positions: (T,) int64, physical position of each row, which decides its KV slot.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    positions: torch.Tensor
    num_rows: int
    max_query_len: int
    max_seq_len: int

    def narrow(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """vLLM's metadata of the step, as this stage sees it."""
        return common.replace(
            query_start_loc=self.query_start_loc,
            query_start_loc_cpu=self.query_start_loc_cpu,
            seq_lens=self.seq_lens,
            seq_lens_cpu_upper_bound=self.seq_lens_cpu,
            num_actual_tokens=self.num_rows,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
            slot_mapping=common.slot_mapping[: self.num_rows],
            positions=self.positions,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


class StagedMetadataBuilder(AttentionMetadataBuilder[Any]):
    """What the worker sees of a stage's builder, whatever backend it builds for.

    Attributes:
        rows: The stage's rows in the step to build for; ``None`` where no request of it
            prunes, and the stage sees what vLLM planned.
    """

    rows: StageRows | None = None


@functools.lru_cache
def create_staged_attention_backend(
    underlying: type[AttentionBackend],
) -> type[AttentionBackend]:
    """A backend whose queries, lengths and slots are those of a stage.

    Raises:
        ValueError: If ``underlying`` is not among :data:`BACKENDS`.
    """
    if underlying.get_name() not in BACKENDS:
        raise ValueError(
            f"visual token pruning does not know attention backend {underlying.get_name()}; "
            f"set --attention-backend to one of {', '.join(BACKENDS)}"
        )
    underlying_builder: Any = underlying.get_builder_cls()
    underlying_impl: Any = underlying.get_impl_cls()

    class StagedBuilder(underlying_builder, StagedMetadataBuilder):
        # Groups of one stage differ in block table and slots alone: build once for all.
        supports_update_block_table = True

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
        ) -> AttentionCGSupport:
            # A stage's lengths are fresh tensors each step, which no full graph can hold.
            return AttentionCGSupport.NEVER

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            if self.rows is not None:
                common_attn_metadata = self.rows.narrow(common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def update_block_table(
            self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
        ) -> Any:
            if self.rows is not None:
                slot_mapping = slot_mapping[: metadata.slot_mapping.shape[0]]
            if underlying_builder.supports_update_block_table:
                return super().update_block_table(metadata, blk_table, slot_mapping)
            updated = copy(metadata)
            updated.block_table = blk_table
            updated.slot_mapping = slot_mapping
            return updated

    class StagedImpl(underlying_impl):
        def forward(
            self,
            layer: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            # Written here, with the stage's slots: outside of the implementation vLLM
            # would write with the runner's, one for each unpruned token.
            if not underlying.forward_includes_kv_cache_update and attn_metadata is not None:
                slots = attn_metadata.slot_mapping
                count = slots.shape[0]  # rows that pad a graph have no slot
                self.do_kv_cache_update(layer, key[:count], value[:count], kv_cache, slots)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
            )

    return subclass_attention_backend_with_overrides(
        name_prefix="Staged",
        attention_backend_cls=underlying,
        overrides={
            "get_builder_cls": staticmethod(lambda: StagedBuilder),
            "get_impl_cls": staticmethod(lambda: StagedImpl),
            "forward_includes_kv_cache_update": True,
        },
    )


class StagedAttention(Attention):
    """An attention layer of a stage; stage 0 computes as vLLM's own, in vLLM's own backend."""

    def __init__(self, *args: Any, stage: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    @classmethod
    def replacing(
        cls, attention: Attention, stage: int, vllm_config: VllmConfig
    ) -> "StagedAttention":
        """The layer that takes ``attention``'s place, under the same name.

        vLLM's decoder layers make their attention themselves and offer no seam for
        another class; an attention layer without weights is cheap to make anew.
        """
        backend = attention.attn_backend
        registered = vllm_config.compilation_config.static_forward_context
        assert registered.pop(attention.layer_name) is attention
        return cls(
            attention.num_heads,
            attention.head_size,
            attention.impl.scale,
            num_kv_heads=attention.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=attention.quant_config,
            prefix=attention.layer_name,
            attn_backend=create_staged_attention_backend(backend) if stage else backend,
            stage=stage,
        )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        full = super().get_kv_cache_spec(vllm_config)
        assert isinstance(full, FullAttentionSpec)
        return replace_as(
            full,
            StagedAttentionSpec,
            drop=("sliding_window", "attention_chunk_size", "non_causal"),
            stage=self.stage,
        )
