"""Attention of a segment, over whichever backend vLLM picked.

The shape follows vLLM's own variants (chunked-local, cross attention): a factory that
subclasses the backend's metadata builder and implementation, and a thin layer.
"""

import functools
from collections.abc import Iterable, Mapping
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
    AttentionType,
    CommonAttentionMetadata,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.worker.utils import AttentionGroup

from vitcop_vllm.engine.backends import BACKENDS
from vitcop_vllm.engine.config import pruning_settings_of
from vitcop_vllm.engine.kv_cache import StagedAttentionSpec


def by_row(of_request: torch.Tensor, query_start_loc: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A value per request, repeated for each of its rows.

    Args:
        of_request: (R,).
        query_start_loc: (R + 1,) int32, first row of each request. Each has at least one row.
        num_rows: T.

    Returns:
        (T,)
    """
    if num_rows == of_request.shape[0]:  # a decode step: one row per request
        return of_request
    # Without output_size, the host would wait for the device.
    return torch.repeat_interleave(of_request, query_start_loc.diff(), output_size=num_rows)


@dataclass(frozen=True)
class PrefillView:
    """What a segment sees of a step in which it has fewer rows than vLLM; R requests, T rows.

    Such a step computes part of a prompt with a pruned image.

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

    def to_metadata(
        self, common: CommonAttentionMetadata, seq_lens: torch.Tensor
    ) -> CommonAttentionMetadata:
        """vLLM's metadata of the step, with the segment's rows; does not use ``seq_lens``."""
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

    def slot_inputs(
        self, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """First row of each request and position of each row, from which KV slots follow."""
        return self.query_start_loc, self.positions


@dataclass(frozen=True)
class DecodeView:
    """What a segment sees of a step with vLLM's rows, in which requests are shorter; R requests.

    Such a step decodes, or computes text after an image.

    Attributes:
        missing, missing_cpu: (R,) int32, tokens of each request without a slot in the segment.
        max_seq_len: The longest physical length after the step.
    """

    missing: torch.Tensor
    missing_cpu: torch.Tensor
    max_seq_len: int

    def to_metadata(
        self, common: CommonAttentionMetadata, seq_lens: torch.Tensor
    ) -> CommonAttentionMetadata:
        """vLLM's metadata of the step, as this segment sees it.

        Args:
            common: Of at least R requests; further requests pad a CUDA graph.
            seq_lens: (max R,) int32, the buffer for the physical lengths.
        """
        num_reqs = self.missing.shape[0]
        lengths = seq_lens[: common.num_reqs].copy_(common.seq_lens)
        lengths[:num_reqs] -= self.missing
        upper_bound = common.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = upper_bound.clone()
            upper_bound[:num_reqs] -= self.missing_cpu
        return common.replace(
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=upper_bound,
            max_seq_len=self.max_seq_len,
            positions=None,  # vLLM's are not the segment's, and no backend of ours reads them
            _num_computed_tokens_cache=None,
        )

    def slot_inputs(
        self, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`PrefillView.slot_inputs`.

        Args:
            query_start_loc: (R + 1,) int32, first row of each request.
            positions: (T,) int64, position of each row in the prompt and its answer.
        """
        missing = by_row(self.missing, query_start_loc, positions.shape[0])
        return query_start_loc, positions - missing


@dataclass
class SegmentBuild:
    """State that the builders of one segment's groups share, to build a step once for all.

    Attributes:
        seq_lens: (max R,) int32, physical lengths; zero for requests that pad a graph. A full
            CUDA graph reads them here, so every step that may run as a graph writes them here.
        rows: The segment's view of the step; ``None`` if no request of the step prunes, and the
            segment sees what vLLM planned.
        metadata: The metadata built for the step; ``None`` before.
    """

    seq_lens: torch.Tensor
    rows: PrefillView | DecodeView | None = None
    metadata: Any = None

    def to_metadata(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """vLLM's metadata of the step, as the segment sees it."""
        if self.rows is not None:
            return self.rows.to_metadata(common, self.seq_lens)
        return common.replace(seq_lens=self.seq_lens[: common.num_reqs].copy_(common.seq_lens))


class StagedMetadataBuilder(AttentionMetadataBuilder[Any]):
    """The part of a segment's builder that is the same for all backends."""

    segment_build: SegmentBuild


def begin_builds(
    groups: Iterable[AttentionGroup], rows: Mapping[int, PrefillView | DecodeView]
) -> None:
    """Give the builders of all groups their segment's view of a step, before they build for it.

    Args:
        groups: Groups of all layers, in any order.
        rows: Segment -> its view of the step; a segment without one sees what vLLM planned.
    """
    first: dict[KVCacheSpec, Any] = {}
    for group in groups:
        builder: Any = group.get_metadata_builder()
        if (leader := first.setdefault(group.kv_cache_spec, builder)) is not builder:
            # vLLM builds once for equal groups. The graphs of all groups must then read what the
            # first group wrote. FlashAttention 3 has its schedule in a buffer of the builder.
            if hasattr(leader, "scheduler_metadata"):
                builder.scheduler_metadata = leader.scheduler_metadata
            if isinstance(builder, StagedMetadataBuilder):
                builder.segment_build = leader.segment_build
        elif isinstance(builder, StagedMetadataBuilder):
            assert isinstance(group.kv_cache_spec, StagedAttentionSpec)
            builder.segment_build.rows = rows.get(group.kv_cache_spec.segment)
            builder.segment_build.metadata = None


@functools.lru_cache
def create_staged_attention_backend(
    underlying: type[AttentionBackend],
) -> type[AttentionBackend]:
    """A backend that computes with the queries, lengths and slots of a segment.

    Raises:
        ValueError: If ``underlying`` is not among :data:`BACKENDS`.
    """
    if underlying.get_name() not in BACKENDS:
        # For engines that skip our start-up hook, which chooses a backend.
        raise ValueError(f"no pruned layer can run on attention backend {underlying.get_name()}")
    underlying_builder: Any = underlying.get_builder_cls()
    underlying_impl: Any = underlying.get_impl_cls()

    class StagedBuilder(underlying_builder, StagedMetadataBuilder):
        # Groups of one segment differ only in block table and slots: build once for all.
        supports_update_block_table = True

        def __init__(
            self,
            kv_cache_spec: KVCacheSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            max_num_reqs = vllm_config.scheduler_config.max_num_seqs
            self.segment_build = SegmentBuild(
                torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
            )

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
        ) -> AttentionCGSupport:
            settings = pruning_settings_of(vllm_config.model_config.hf_config)
            if settings.positions == "reference":
                # A step of a prompt's last token alone looks like a decode step to vLLM, but
                # runs in segments, which a full graph cannot.
                return AttentionCGSupport.NEVER
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            # No graphs of prefill: vLLM would also run them for steps that drop rows.
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            step = self.segment_build
            if step.metadata is not None:  # model runner V2 calls each group's builder
                return self.update_block_table(
                    step.metadata,
                    common_attn_metadata.block_table_tensor,
                    common_attn_metadata.slot_mapping,
                )
            step.metadata = super().build(
                common_prefix_len, step.to_metadata(common_attn_metadata), fast_build
            )
            return step.metadata

        def update_block_table(
            self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
        ) -> Any:
            num_rows = metadata.slot_mapping.shape[0]
            if num_rows < slot_mapping.shape[0]:
                slot_mapping = slot_mapping[:num_rows]
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
            # vLLM would write the KV cache outside of the implementation, with the runner's
            # slots, which are those of unpruned tokens.
            if not underlying.forward_includes_kv_cache_update and attn_metadata is not None:
                slots = attn_metadata.slot_mapping
                count = slots.shape[0]
                if count < key.shape[0]:  # rows that pad a graph have no slot
                    key, value = key[:count], value[:count]
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
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


def _features_that_would_be_lost(attention: Any) -> list[str]:
    """Features of an attention layer that :meth:`StagedAttention.replacing` would drop."""
    impl = attention.impl
    features = {
        "a sliding window": attention.sliding_window is not None,
        "a soft cap on scores": bool(getattr(impl, "logits_soft_cap", 0)),
        "attention sinks": attention.has_sink,
        "ALiBi slopes": getattr(impl, "alibi_slopes", None) is not None,
        "a KV cache of another layer": attention.kv_sharing_target_layer_name is not None,
        "values of another size than keys": attention.head_size_v != attention.head_size,
        f"type {attention.attn_type}": attention.attn_type != AttentionType.DECODER,
    }
    return [name for name, is_there in features.items() if is_there]


class StagedAttention(Attention):
    """An attention layer of a segment. In segment 0 it uses vLLM's backend unchanged."""

    def __init__(self, *args: Any, segment: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.segment = segment

    @classmethod
    def replacing(
        cls, attention: Attention, segment: int, vllm_config: VllmConfig
    ) -> "StagedAttention":
        """The layer that takes ``attention``'s place, under the same name.

        vLLM's decoder layers construct their attention and take no other class. An attention
        layer has no weights, so constructing it again is cheap.

        Raises:
            NotImplementedError: If the layer has a feature that the new one would not have.
        """
        if features := _features_that_would_be_lost(attention):
            raise NotImplementedError(
                f"attention layer {attention.layer_name} has {', '.join(features)}, which pruned "
                "layers do not support; serve the model with stock vLLM (VLLM_PLUGINS='')"
            )
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
            attn_backend=create_staged_attention_backend(backend) if segment else backend,
            segment=segment,
        )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        full = super().get_kv_cache_spec(vllm_config)
        assert isinstance(full, FullAttentionSpec)
        return replace_as(
            full,
            StagedAttentionSpec,
            drop=("sliding_window", "attention_chunk_size", "non_causal"),
            segment=self.segment,
        )
