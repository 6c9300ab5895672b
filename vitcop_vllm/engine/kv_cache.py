"""KV cache of a segment: compact block tables, in which dropped tokens take no slot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashList,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vitcop_vllm.engine.prefix_cache import PrefixHashes, StepWrites
from vitcop_vllm.pruning.plan import RequestPlan


class StagedKVCacheManager(SingleTypeKVCacheManager):
    """vLLM's manager, with requests of their *physical* length: dropped tokens take no slot.

    Attributes:
        segment: 0, 1 or 2.
        plans: Request id -> plan, shared by all segments and owned by the scheduler; without the
            requests that prune nothing.
        writes: Blocks that the step being scheduled will write, shared by all segments.
    """

    plans: Mapping[str, RequestPlan]
    writes: StepWrites

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.kv_cache_spec, StagedAttentionSpec)
        self.segment = self.kv_cache_spec.segment
        self.plans = {}
        self.writes = StepWrites()
        # Request id -> the checkpoint up to which its blocks are cached.
        self._cached_tokens: dict[str, int] = {}

    def num_slots(self, request_id: str, num_tokens: int) -> int:
        """Slots this segment holds for the request's first ``num_tokens`` tokens."""
        plan = self.plans.get(request_id)
        return num_tokens if plan is None else plan.num_slots(num_tokens, self.segment)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        plan = self.plans.get(request_id)
        if plan is not None:
            num_tokens = plan.num_slots(num_tokens, self.segment)
            # A running request has no new hits, and vLLM ignores these two numbers.
            if request_id not in self.num_cached_block:
                total_computed_tokens = plan.num_slots(total_computed_tokens, self.segment)
                num_local_computed_tokens = plan.num_slots(num_local_computed_tokens, self.segment)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            *args,
            **kwargs,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        self._cached_tokens[request_id] = num_local_computed_tokens
        super().add_local_computed_blocks(
            request_id,
            new_computed_blocks,
            self.num_slots(request_id, num_local_computed_tokens),
            num_external_computed_tokens,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        slots = self.num_slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def passes_checkpoint(self, request: Request, num_tokens: int) -> bool:
        """Whether the request's first ``num_tokens`` reach a checkpoint that is not cached yet."""
        if not self.enable_caching:
            return False
        hashes = request.block_hashes
        assert isinstance(hashes, PrefixHashes)
        cached = self._cached_tokens.get(request.request_id, 0)
        return num_tokens >= hashes.next_length(cached)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        hashes, name = request.block_hashes, request.request_id
        cached = self._cached_tokens.get(name, 0)
        assert isinstance(hashes, PrefixHashes)
        blocks = self.req_to_blocks[name]
        written = self.writes.block_ids.setdefault(name, set())
        for checkpoint in hashes.passed(self.segment, cached, num_tokens):
            for index, key in checkpoint.keys:
                self._add_key(blocks[index], key, checkpoint.length)
                self.writes.keys.add(key)
                written.add(blocks[index].block_id)
            self._cached_tokens[name] = checkpoint.length
            self.num_cached_block[name] = checkpoint.slots // self.block_size

    def _add_key(self, block: KVCacheBlock, key: BlockHash, num_tokens: int) -> None:
        """Register a block under one more key: that of a prefix of ``num_tokens``.

        vLLM's methods remove a block's shorter keys when they add a longer one. Here they stay,
        because a hit may end at any checkpoint inside the block. As in vLLM, the first key is
        that of the longest prefix: from its length vLLM counts the prompt tokens that a request
        wrote to the cache.
        """
        shorter = self.block_pool._remove_cached_block_hashes(block)
        longest = make_block_hash_with_group_id(key, self.kv_cache_group_id)
        for block_hash in (longest, *shorter):
            self.block_pool._insert_block_hash(block_hash, block, num_tokens=num_tokens)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._cached_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self.writes.clear()

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
        """The longest cache hit of at most ``max_length`` prompt positions.

        Returns:
            Blocks of each group, and the length of the hit, which all groups have.
        """
        assert isinstance(block_hashes, PrefixHashes)
        assert isinstance(kv_cache_spec, StagedAttentionSpec)
        block_size = kv_cache_spec.block_size
        whole: list[list[KVCacheBlock]] = []
        hit, length = whole, 0
        for checkpoint in block_hashes.checkpoints(kv_cache_spec.segment, 0, max_length):
            cached = [
                block_pool.get_cached_block(key, kv_cache_group_ids) for _, key in checkpoint.keys
            ]
            has_tail = checkpoint.slots % block_size > 0
            tail = cached.pop() if has_tail else None
            if None in cached:
                break  # every longer prefix needs this block too
            whole += [blocks for blocks in cached if blocks]
            if not has_tail:
                hit, length = [*whole], checkpoint.length
            elif tail is not None:
                # It will be copied before this step runs, so this step must not write it.
                if checkpoint.keys[-1][1] in block_hashes.writes.keys:
                    block_hashes.awaits_copy = True
                else:
                    hit, length = [*whole, tail], checkpoint.length
        return tuple([blocks[i] for blocks in hit] for i in range(len(kv_cache_group_ids))), length


# vLLM fills its registry on first use, and only if it is empty: fill it before we add to it.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=StagedKVCacheManager)
@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(AttentionSpec):
    """Full attention over the tokens alive in one segment.

    Not a FullAttentionSpec: vLLM would merge the segments into one group, whose blocks follow
    prompt positions.

    Attributes:
        segment: 0, 1 or 2. In segment 0 slots are prompt positions, as in vLLM, but a hit may end
            inside a block as in the other segments.
    """

    segment: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request, which may prune nothing."""
        max_model_len = vllm_config.model_config.max_model_len
        return cdiv(max_model_len, self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> "StagedAttentionSpec":
        """One spec for layers of one segment.

        Raises:
            AssertionError: If the layers are of several segments; vLLM then splits them.
        """
        assert len({type(spec) for spec in specs}) == 1, "segments are not merged with other layers"
        return super().merge(list(specs))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, StagedAttentionSpec) and spec.segment == self.segment
            for spec in kv_cache_specs.values()
        )


def segments_of_groups(kv_cache_config: KVCacheConfig) -> list[int]:
    """(G,) segment of each KV cache group.

    Raises:
        AssertionError: If a group's layers are not staged.
    """
    segments = []
    for group in kv_cache_config.kv_cache_groups:
        assert isinstance(group.kv_cache_spec, StagedAttentionSpec), group.kv_cache_spec
        segments.append(group.kv_cache_spec.segment)
    return segments
