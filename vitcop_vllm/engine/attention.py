"""Attention of one stage, built on the backend that vLLM picked.

A *stage* is a run of decoder layers that compute the same rows: stage 0, 1 or 2.

The module follows vLLM's own variants (chunked-local, cross attention): a factory subclasses the
backend's metadata builder and implementation, and a thin layer uses them.
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


def by_row(values: torch.Tensor, query_start_loc: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Repeat each request's value for each row of the request.

    Args:
        values: (R,), one value per request.
        query_start_loc: (R + 1,) int32, first row of each request. A request has at least one row.
        num_rows: T.

    Returns:
        (T,), one value per row.
    """
    if num_rows == values.shape[0]:  # one row per request, as in a decode step
        return values
    # With output_size the host does not wait for the device.
    return torch.repeat_interleave(values, query_start_loc.diff(), output_size=num_rows)


@dataclass(frozen=True)
class StageRows:
    """A stage's view of a step in which its rows differ from vLLM's; R requests, T rows.

    Attributes:
        query_start_loc, query_start_loc_cpu: (R + 1,) int32, first row of each request.
        seq_lens, seq_lens_cpu: (R,) int32, physical length of each request after the step.
        positions: (T,) int64, physical position of each row, which determines its KV slot.
        num_rows: T.
        max_query_len: Largest number of rows of a request.
        max_seq_len: Largest physical length after the step.
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
        """vLLM's metadata of the step with this stage's rows; ``seq_lens`` is not used."""
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
        """First row of each request and position of each row, which determine the KV slots.

        Args:
            query_start_loc: (R + 1,) int32, first row of each request in vLLM's step.
            positions: Position of each row of vLLM's step in the prompt and its answer.
        """
        return self.query_start_loc, self.positions


@dataclass(frozen=True)
class StageLengths:
    """A stage's view of a step in which it computes vLLM's rows, but with shorter sequences.

    R requests. Decode steps are of this kind.

    Attributes:
        missing, missing_cpu: (R,) int32, tokens of each request without a slot in the stage.
        max_seq_len: Largest physical length after the step.
    """

    missing: torch.Tensor
    missing_cpu: torch.Tensor
    max_seq_len: int

    def to_metadata(
        self, common: CommonAttentionMetadata, seq_lens: torch.Tensor
    ) -> CommonAttentionMetadata:
        """vLLM's metadata of the step with this stage's sequence lengths.

        Args:
            common: Metadata of at least R requests. Requests after the first R are padding of a
                CUDA graph.
            seq_lens: (max R,) int32, output buffer for the physical lengths.
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
            positions=None,  # vLLM's are wrong for the stage, and no supported backend reads them
            _num_computed_tokens_cache=None,
        )

    def slot_inputs(
        self, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`StageRows.slot_inputs`.

        Args:
            query_start_loc: (R + 1,) int32, first row of each request in vLLM's step.
            positions: (T,) int64, position of each row in the prompt and its answer.
        """
        missing = by_row(self.missing, query_start_loc, positions.shape[0])
        return query_start_loc, positions - missing


@dataclass
class StageBuild:
    """State that the metadata builders of one stage's KV cache groups share.

    The first builder builds the metadata of a step. The others copy it.

    Attributes:
        seq_lens: (max R,) int32, physical lengths. A full CUDA graph reads this buffer, so every
            step that a graph may replay writes its lengths here. Padding requests have length 0.
        rows: The stage's view of the step; ``None`` if it is the step as vLLM planned it.
        metadata: Metadata of the step; ``None`` until the first builder has built it.
    """

    seq_lens: torch.Tensor
    rows: StageRows | StageLengths | None = None
    metadata: Any = None

    def to_metadata(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """vLLM's metadata of the step with the stage's rows and lengths."""
        if self.rows is not None:
            return self.rows.to_metadata(common, self.seq_lens)
        return common.replace(seq_lens=self.seq_lens[: common.num_reqs].copy_(common.seq_lens))


class StagedMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Base class of every stage's builder, for any backend."""

    stage_build: StageBuild


def begin_builds(
    groups: Iterable[AttentionGroup], rows: Mapping[int, StageRows | StageLengths]
) -> None:
    """Give the builders of all stages their view of a step, before they build metadata for it.

    Args:
        groups: Attention groups of all layers, in any order.
        rows: Stage -> its view of the step. A stage is absent if vLLM's plan is right for it.
    """
    first: dict[KVCacheSpec, Any] = {}
    for group in groups:
        builder: Any = group.get_metadata_builder()
        if (leader := first.setdefault(group.kv_cache_spec, builder)) is not builder:
            # vLLM may build once for groups of equal spec. The CUDA graphs of these groups must
            # then read the buffers that the first builder writes: lengths, and in
            # FlashAttention 3 also a schedule.
            if hasattr(leader, "scheduler_metadata"):
                builder.scheduler_metadata = leader.scheduler_metadata
            if isinstance(builder, StagedMetadataBuilder):
                builder.stage_build = leader.stage_build
        elif isinstance(builder, StagedMetadataBuilder):
            assert isinstance(group.kv_cache_spec, StagedAttentionSpec)
            builder.stage_build.rows = rows.get(group.kv_cache_spec.stage)
            builder.stage_build.metadata = None


@functools.lru_cache
def create_staged_attention_backend(
    underlying: type[AttentionBackend],
) -> type[AttentionBackend]:
    """A subclass of ``underlying`` that uses a stage's query rows, lengths and slots.

    Raises:
        ValueError: If ``underlying`` is not in :data:`BACKENDS`.
    """
    if underlying.get_name() not in BACKENDS:
        # The start-up hook chooses or refuses a backend, but some engines skip the hook.
        raise ValueError(
            f"visual token pruning cannot run on attention backend {underlying.get_name()}; "
            f"set --attention-backend to {' or '.join(BACKENDS)}"
        )
    underlying_builder: Any = underlying.get_builder_cls()
    underlying_impl: Any = underlying.get_impl_cls()

    class StagedBuilder(underlying_builder, StagedMetadataBuilder):
        # Groups of one stage differ only in block table and slots, so one build serves them all.
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
            self.stage_build = StageBuild(
                torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
            )

        @classmethod
        def get_cudagraph_support(
            cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
        ) -> AttentionCGSupport:
            settings = pruning_settings_of(vllm_config.model_config.hf_config)
            if settings.positions == "reference":
                # vLLM takes a step that computes only a prompt's last token for a decode step.
                # Here such a step runs stage by stage, which a full graph does not do.
                return AttentionCGSupport.NEVER
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            # No graphs of prefill: vLLM would also replay them for steps that drop rows.
            return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            step = self.stage_build
            if step.metadata is not None:  # model runner V2 calls the builder of each group
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
            # Write K and V here, to the stage's slots. vLLM's own write would use the runner's
            # slots, one for each unpruned token.
            if not underlying.forward_includes_kv_cache_update and attn_metadata is not None:
                slots = attn_metadata.slot_mapping
                count = slots.shape[0]
                if count < key.shape[0]:  # padding rows of a graph have no slot
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


def _unsupported_features(attention: Any) -> list[str]:
    """Features of a vLLM attention layer that :meth:`StagedAttention.replacing` does not copy."""
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
    return [name for name, is_used in features.items() if is_used]


class StagedAttention(Attention):
    """An attention layer of a stage. In stage 0 it uses vLLM's backend unchanged."""

    def __init__(self, *args: Any, stage: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    @classmethod
    def replacing(
        cls, attention: Attention, stage: int, vllm_config: VllmConfig
    ) -> "StagedAttention":
        """A staged layer that replaces ``attention`` under the same name.

        vLLM's decoder layers create their attention layer themselves, without an option for
        another class. An attention layer has no weights, so a second one is cheap.

        Raises:
            NotImplementedError: If ``attention`` has a feature that the staged layer lacks.
        """
        if features := _unsupported_features(attention):
            raise NotImplementedError(
                f"attention layer {attention.layer_name} has {', '.join(features)}, which stages "
                "do not support; serve the model with stock vLLM (VLLM_PLUGINS='')"
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
