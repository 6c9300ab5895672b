"""Prefix lengths at which a cache hit may end, and the keys of their blocks.

vLLM caches a block when it is full, under the hash of the prompt up to the block's end. The blocks
of a pruned request in a segment do not end at multiples of prompt positions. So cache hits end at
*checkpoints*, which are the same in all segments:

- each whole block of prompt positions, as in vLLM, unless it ends inside the span of a pruned
  image, because no step computes part of such a span;
- the end of each span, so that any question about an image reuses all of it.

At a checkpoint the last block of a segment may be partly filled. A request that hits it gets a copy
of that block, which vLLM makes (copy-on-write).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.request import Request

from vitcop_vllm.pruning.plan import RequestPlan


class Checkpoint(NamedTuple):
    """A prefix length at which a cache hit may end, in one segment.

    Attributes:
        length: Prompt positions, placeholders included.
        slots: KV slots of the prefix in the segment.
        keys: For each block with slots after the previous checkpoint: its index in the
            request's block table, and the key of its content up to this checkpoint. Only the
            last block may be partly filled.
    """

    length: int
    slots: int
    keys: list[tuple[int, BlockHash]]


@dataclass
class StepWrites:
    """Blocks that the step being scheduled will write.

    Another request of the same step may hit a full block: in each layer, blocks are written
    before they are read. It may not hit a block that it must copy, because copies are made before
    the step.

    Attributes:
        keys: Keys of the checkpoints registered in this step.
        block_ids: Request id -> its blocks registered under these keys.
    """

    keys: set[BlockHash] = field(default_factory=set)
    block_ids: dict[str, set[int]] = field(default_factory=dict)

    def clear(self) -> None:
        self.keys.clear()
        self.block_ids.clear()


@dataclass
class PreemptedPrefillStats(PrefillStats):
    """vLLM's counts of a request's prompt, for a request that was preempted.

    When a request's first token arrives, vLLM 0.32 counts the tokens that the request wrote to
    the prefix cache, in the blocks that it holds then (``Scheduler.update_from_output``). With
    asynchronous scheduling a preemption may come before the token: the request then holds no
    blocks, and vLLM would count 0. So the tokens are counted at the preemption too.
    """

    def finalize(self, num_cached_tokens: int) -> None:
        counted = self.num_cached_tokens + self.num_cache_creation_tokens
        super().finalize(max(counted, num_cached_tokens))


class PrefixHashes(list[BlockHash]):
    """A request's block hashes, which vLLM extends, with its plan.

    Args:
        request: Its prompt holds the plan's spans.
        plan: Without spans for requests that prune nothing.
        block_size: Tokens of a block, and of a hash.
        hash_function: The one its block hashes are made with.
        writes: Of the scheduler that the request is given to.

    Attributes:
        awaits_copy: True if the last look-up skipped a hit only because its last block is
            written in this same step.
    """

    def __init__(
        self,
        request: Request,
        plan: RequestPlan,
        block_size: int,
        hash_function: Callable[[Any], bytes],
        writes: StepWrites,
    ) -> None:
        super().__init__(request.block_hashes)
        self.plan = plan
        self.block_size = block_size
        self.writes = writes
        self.awaits_copy = False
        self._span_ends: dict[int, BlockHash] = {}
        for end in (span.end for span in plan.spans):
            start = end // block_size * block_size
            if start == end:
                continue  # vLLM has this hash
            extra_keys, _ = generate_block_hash_extra_keys(request, start, end, 0)
            self._span_ends[end] = hash_block_tokens(
                hash_function,
                self[start // block_size - 1] if start else None,
                request.all_token_ids[start:end],
                extra_keys,
            )
        self._next = 0, self._find_next(0)
        self._passed: tuple[tuple[int, int, int], list[Checkpoint]] = (0, 0, 0), []

    def _find_next(self, after: int) -> int:
        whole = after // self.block_size * self.block_size + self.block_size
        while self.plan.cuts_span(whole):
            whole += self.block_size
        span_end = self.plan.next_span_end(after)
        return whole if span_end is None else min(whole, span_end)

    def next_length(self, after: int) -> int:
        """Length of the first checkpoint past ``after``; ``after`` is a checkpoint, or 0."""
        # Each KV cache group calls this in each step, and the result seldom changes.
        if self._next[0] != after:
            self._next = after, self._find_next(after)
        return self._next[1]

    def passed(self, segment: int, after: int, until: int) -> list[Checkpoint]:
        """:meth:`checkpoints` as a list."""
        # The KV cache groups of a segment call this one after another.
        key = segment, after, until
        if self._passed[0] != key:
            self._passed = key, [*self.checkpoints(*key)]
        return self._passed[1]

    def checkpoints(self, segment: int, after: int, until: int) -> Iterator[Checkpoint]:
        """Checkpoints in (after, until], ascending; ``after`` is a checkpoint, or 0."""
        slots = self.plan.num_slots(after, segment)
        length = self._find_next(after)
        while length <= until:
            first, slots = slots // self.block_size, self.plan.num_slots(length, segment)
            last = cdiv(slots, self.block_size) - 1
            key = self._span_ends.get(length) or self[length // self.block_size - 1]
            # The key of the prefix is that of its last block. Other blocks add their index.
            keys = [(i, BlockHash(key + i.to_bytes(4))) for i in range(first, last)]
            yield Checkpoint(length, slots, [*keys, (last, key)])
            length = self._find_next(length)
