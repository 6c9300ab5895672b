"""Prefix caching of pruned requests: at which lengths a prefix is cached, and under which keys.

vLLM caches a block when it is full. Its key is the hash of the prompt up to the block's end. A
pruned request has fewer slots than prompt positions in a stage, so its blocks end elsewhere.
Therefore prefixes are cached at *checkpoints*, which are the same in all stages (runs of decoder
layers, numbered 0 to 2):

- at the end of each whole block of prompt positions, as in vLLM, but not inside a pruned image,
  because no step computes only part of a pruned image;
- at the end of each image, so that prompts with the same image and other questions reuse all of it.

A stage's last block at a checkpoint may be partly filled. vLLM copies such a block for the request
that reuses it.
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
    """A prefix that later requests may reuse, as one stage stores it.

    Attributes:
        length: Prompt positions, placeholders included.
        slots: KV slots of the prefix in the stage.
        keys: For each block with slots added since the previous checkpoint: the block's index
            in the request's block table, and the key of its content up to this checkpoint. Only
            the last block may be partly filled.
    """

    length: int
    slots: int
    keys: list[tuple[int, BlockHash]]


@dataclass
class StepWrites:
    """The cached blocks that the step being scheduled will write.

    A block can be found in the cache as soon as it is scheduled. A request of the same step may
    read it, because each layer writes the block before it reads it. A request of the same step
    may not copy it, because vLLM copies blocks before the step runs.

    Attributes:
        keys: Keys of the checkpoints registered in this step.
        block_ids: Request id -> blocks registered under these keys.
    """

    keys: set[BlockHash] = field(default_factory=set)
    block_ids: dict[str, set[int]] = field(default_factory=dict)

    def clear(self) -> None:
        self.keys.clear()
        self.block_ids.clear()


@dataclass
class PreemptedPrefillStats(PrefillStats):
    """vLLM's prefill statistics, for a request that was preempted.

    vLLM 0.32 counts the tokens that a request wrote to the prefix cache when the request's first
    token arrives, from the blocks that the request then holds (``Scheduler.update_from_output``).
    With asynchronous scheduling the request may be preempted before its first token arrives. It
    then holds no blocks, and vLLM would count 0. So the tokens are also counted at preemption.
    """

    def finalize(self, num_cached_tokens: int) -> None:
        counted = self.num_cached_tokens + self.num_cache_creation_tokens
        super().finalize(max(counted, num_cached_tokens))


class PrefixHashes(list[BlockHash]):
    """A request's block hashes with its plan. vLLM appends hashes to the list.

    Args:
        request: The request, whose prompt contains the plan's spans.
        plan: The request's plan; it has no spans if the request prunes nothing.
        block_size: Tokens of a block, and of a hash.
        hash_function: The function that vLLM computes block hashes with.
        writes: Writes of the scheduler that runs the request.

    Attributes:
        awaits_copy: Whether the last look-up skipped a cache hit only because this step still
            writes the hit's last block.
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
                continue  # vLLM hashes whole blocks
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
        """Length of the first checkpoint past ``after``, which is a checkpoint or 0."""
        # Each KV cache group calls this in each step, and the result seldom changes.
        if self._next[0] != after:
            self._next = after, self._find_next(after)
        return self._next[1]

    def passed(self, stage: int, after: int, until: int) -> list[Checkpoint]:
        """:meth:`checkpoints` as a list."""
        # The KV cache groups of a stage call this in turn with the same arguments.
        arguments = stage, after, until
        if self._passed[0] != arguments:
            self._passed = arguments, [*self.checkpoints(*arguments)]
        return self._passed[1]

    def checkpoints(self, stage: int, after: int, until: int) -> Iterator[Checkpoint]:
        """Checkpoints in (after, until], ascending; ``after`` is a checkpoint or 0."""
        slots = self.plan.num_slots(after, stage)
        length = self._find_next(after)
        while length <= until:
            first, slots = slots // self.block_size, self.plan.num_slots(length, stage)
            last = cdiv(slots, self.block_size) - 1
            key = self._span_ends.get(length) or self[length // self.block_size - 1]
            # The hash of the prefix is the key of its last block. Keys of the other blocks are
            # this hash with the block's index appended.
            keys = [(i, BlockHash(key + i.to_bytes(4))) for i in range(first, last)]
            yield Checkpoint(length, slots, [*keys, (last, key)])
            length = self._find_next(length)
