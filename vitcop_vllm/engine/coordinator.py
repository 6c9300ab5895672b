"""vLLM's coordinator of KV cache groups, which reads one group of each segment instead of all."""

from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vitcop_vllm.adoption import adopt_with
from vitcop_vllm.engine.kv_cache import StagedKVCacheManager


class _Segment(NamedTuple):
    """Groups of one segment: their number, and the manager of the first, equal to the others."""

    manager: StagedKVCacheManager
    num_groups: int


class StagedCoordinator(KVCacheCoordinator):
    """Computes per segment what vLLM computes per group.

    vLLM spreads the layers of a segment over groups of equal size, 12 to 16 in all. The groups of a
    segment hold the same tokens, in equally many blocks, cached up to the same checkpoint. In most
    steps a running request needs no block and passes no checkpoint: three managers are enough to
    see that.
    """

    _segments: tuple[_Segment, ...]
    _no_blocks: tuple[list[KVCacheBlock], ...]

    @classmethod
    def adopt(cls, coordinator: Any) -> None:
        """Make ``coordinator`` an instance of this class, whether or not it caches prefixes."""
        adopt_with(coordinator, cls)
        managers: dict[int, list[StagedKVCacheManager]] = {}
        for manager in coordinator.single_type_managers:
            managers.setdefault(manager.segment, []).append(manager)
        coordinator._segments = tuple(_Segment(same[0], len(same)) for same in managers.values())
        coordinator._no_blocks = tuple([] for _ in coordinator.single_type_managers)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        missing = self._missing_blocks(request_id, num_tokens)
        if missing is None:
            return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        return missing

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int | None:
        """Blocks of all groups that ``num_tokens`` need and the request does not have yet.

        ``None`` for a request without blocks: then prefix hits count too, and vLLM counts them.
        """
        missing = 0
        for manager, num_groups in self._segments:
            blocks = manager.req_to_blocks.get(request_id)
            if not blocks:
                return None
            needed = cdiv(manager.num_slots(request_id, num_tokens), manager.block_size)
            missing += max(needed - len(blocks), 0) * num_groups
        return missing

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        if self._missing_blocks(request_id, num_tokens) == 0 and not any(
            request_id in manager._partial_hit_reqs for manager, _ in self._segments
        ):
            return self._no_blocks
        return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if self._segments[0].manager.passes_checkpoint(request, num_computed_tokens):
            super().cache_blocks(request, num_computed_tokens)

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Remove nothing: attention reads every token that is alive in a segment."""
