"""KV cache of one stage: dropped tokens take no slot, so a request needs fewer blocks.

A *stage* is a run of decoder layers that compute the same rows: stage 0, 1 or 2.
"""

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
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec
from vllm.v1.request import Request

from vitcop_vllm.engine.prefix_cache import PrefixHashes, StepWrites
from vitcop_vllm.pruning.plan import RequestPlan


class StagedKVCacheManager(SingleTypeKVCacheManager):
    """vLLM's manager, but a request takes the blocks of its *physical* length.

    Attributes:
        stage: 0, 1 or 2.
        plans: Request id -> plan of each request with pruned images. The scheduler maintains
            this dictionary, and all stages share it.
        writes: What the step being scheduled writes. All stages share it.
    """

    plans: Mapping[str, RequestPlan]
    writes: StepWrites

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.kv_cache_spec, StagedAttentionSpec)
        self.stage = self.kv_cache_spec.stage
        self.plans = {}
        self.writes = StepWrites()
        # Request id -> length of the last checkpoint whose blocks are cached.
        self._cached_tokens: dict[str, int] = {}

    def num_slots(self, request_id: str, num_tokens: int) -> int:
        """KV slots of the request's first ``num_tokens`` tokens in this stage."""
        plan = self.plans.get(request_id)
        return num_tokens if plan is None else plan.num_slots(num_tokens, self.stage)

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
            num_tokens = plan.num_slots(num_tokens, self.stage)
            # vLLM ignores the computed tokens of a running request: it has no new cache hits.
            if request_id not in self.num_cached_block:
                total_computed_tokens = plan.num_slots(total_computed_tokens, self.stage)
                num_local_computed_tokens = plan.num_slots(num_local_computed_tokens, self.stage)
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
        """Whether the request's first ``num_tokens`` tokens reach a checkpoint not yet cached."""
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
        for checkpoint in hashes.passed(self.stage, cached, num_tokens):
            for index, key in checkpoint.keys:
                self._add_key(blocks[index], key, checkpoint.length)
                self.writes.keys.add(key)
                written.add(blocks[index].block_id)
            self._cached_tokens[name] = checkpoint.length
            self.num_cached_block[name] = checkpoint.slots // self.block_size

    def _add_key(self, block: KVCacheBlock, key: BlockHash, num_tokens: int) -> None:
        """Add a key to a block: the key of a prefix of ``num_tokens`` tokens.

        vLLM's own methods remove a block's keys of shorter prefixes when they add a longer one.
        Here these keys stay, because a prefix may end at any checkpoint inside the block. As in
        vLLM, the key of the longest prefix comes first: vLLM reads its length to count the
        prompt tokens that a request wrote to the cache.
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
        """Find the longest checkpoint, up to ``max_length``, whose blocks all groups have cached.

        Returns:
            The checkpoint's blocks in each group, and its length in prompt positions.
        """
        assert isinstance(block_hashes, PrefixHashes)
        assert isinstance(kv_cache_spec, StagedAttentionSpec)
        block_size = kv_cache_spec.block_size
        whole: list[list[KVCacheBlock]] = []
        hit, length = whole, 0
        for checkpoint in block_hashes.checkpoints(kv_cache_spec.stage, 0, max_length):
            cached = [
                block_pool.get_cached_block(key, kv_cache_group_ids) for _, key in checkpoint.keys
            ]
            has_tail = checkpoint.slots % block_size > 0
            tail = cached.pop() if has_tail else None
            if None in cached:
                break  # every longer checkpoint needs this block too
            whole += [blocks for blocks in cached if blocks]
            if not has_tail:
                hit, length = [*whole], checkpoint.length
            elif tail is not None:
                # vLLM copies the block before this step runs, so this step must not write it.
                if checkpoint.keys[-1][1] in block_hashes.writes.keys:
                    block_hashes.awaits_copy = True
                else:
                    hit, length = [*whole, tail], checkpoint.length
        return tuple([blocks[i] for blocks in hit] for i in range(len(kv_cache_group_ids))), length


# vLLM registers its own classes only while the table is empty, so it must do so first.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(manager_class=StagedKVCacheManager)
@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(AttentionSpec):
    """Full attention over the tokens kept in one stage.

    Not a FullAttentionSpec: vLLM assumes one slot per token in such a spec, and would put all
    stages into one group.

    Attributes:
        stage: 0, 1 or 2. Stage 0 has one slot per prompt position, as vLLM has. But a cached
            prefix may end inside a block, as in the other stages.
    """

    stage: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the longest request. It may be unpruned."""
        max_model_len = vllm_config.model_config.max_model_len
        return cdiv(max_model_len, self.block_size) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> "StagedAttentionSpec":
        """One spec for layers of one stage.

        Raises:
            AssertionError: If the specs are of several stages. vLLM then splits them into groups.
        """
        assert len({type(spec) for spec in specs}) == 1, "a stage cannot share a group with others"
        return super().merge(list(specs))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(
            isinstance(spec, StagedAttentionSpec) and spec.stage == self.stage
            for spec in kv_cache_specs.values()
        )
