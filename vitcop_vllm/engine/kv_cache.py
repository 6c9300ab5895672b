"""KV cache of a stage: block tables filled compactly, dropped tokens never take a slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vitcop_vllm.pruning.plan import RequestPlan


class StagedKVCacheManager(SingleTypeKVCacheManager):
    """Asks vLLM's manager for the blocks of a request's *physical* length.

    Attributes:
        plans: Request id -> plan, shared by all stages and kept by the scheduler;
            requests without pruned pictures are not in it.
    """

    plans: Mapping[str, RequestPlan] = {}

    @property
    def stage(self) -> int:
        spec = self.kv_cache_spec
        assert isinstance(spec, StagedAttentionSpec)
        return spec.stage

    def physical_length(self, request_id: str, num_tokens: int) -> int:
        """Slots this stage holds for the request's first ``num_tokens`` tokens."""
        plan = self.plans.get(request_id)
        return num_tokens if plan is None else plan.physical_length(num_tokens, self.stage)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        physical = self.physical_length(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, physical, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        physical = self.physical_length(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, physical, num_tokens_main_model)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Nothing is cached: start-up turns prefix caching off."""
        return tuple([] for _ in kv_cache_group_ids), 0


# Registering a class of ours while the table is empty would keep vLLM's own out of it.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=StagedKVCacheManager)
@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(AttentionSpec):
    """Full attention over the tokens alive in one stage.

    Not a FullAttentionSpec: vLLM takes those for groups whose blocks follow logical
    positions, and would fold the stages into one group.

    Attributes:
        stage: 1 or 2. Layers of stage 0 keep vLLM's own spec.
    """

    stage: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes for the longest request, which may be one that prunes nothing."""
        max_model_len = vllm_config.model_config.max_model_len
        return cdiv(max_model_len, self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> "StagedAttentionSpec":
        """One spec for layers of one stage.

        Raises:
            AssertionError: If the layers are of several stages; vLLM then splits them.
        """
        assert len({type(spec) for spec in specs}) == 1, "stages are not merged with other layers"
        return super().merge(list(specs))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, StagedAttentionSpec) and spec.stage == self.stage
            for spec in kv_cache_specs.values()
        )
