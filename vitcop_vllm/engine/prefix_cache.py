"""Where a request's prefix may be taken up again, and under which keys its blocks lie.

vLLM caches a block once it is full and finds it again by the hash of the prompt up to its
end. A pruned request's blocks in a stage do not end where blocks of prompt positions do. So
prefixes are reused at *checkpoints*, equal in all stages: at each whole block of prompt
positions, as in vLLM, except inside a pruned image's span, which is never computed in parts; and
at each span's end, so that an image is reused whole whatever is asked about it. A stage's last
block is then partly filled, and the request that reuses it gets a copy, by vLLM's own means.
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
    """A prefix length at which a later request may go on, seen by one stage.

    Attributes:
        length: Prompt positions, placeholders included.
        slots: KV slots that they take in the stage.
        keys: For each block that has slots since the checkpoint before: its place in the
            request's block table, and the key of its content up to here. Only the last of
            them may be partly filled.
    """

    length: int
    slots: int
    keys: list[tuple[int, BlockHash]]


@dataclass
class StepWrites:
    """What the step being scheduled will have written when it has run.

    Blocks are found from the moment they are scheduled: whoever reads them in the same step
    reads after they were written, layer by layer. Copies are made before the step.

    Attributes:
        keys: Of checkpoints registered in this step.
        block_ids: Of the blocks registered under them, by request.
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
        awaits_copy: Whether the last look-up passed over a checkpoint for nothing but that
            its last block is written in this very step.
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
                continue  # vLLM's own
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
        """Length of the first checkpoint past ``after``, which is one, or 0."""
        # Asked for by each KV cache group in each step, and the answer seldom changes.
        if self._next[0] != after:
            self._next = after, self._find_next(after)
        return self._next[1]

    def passed(self, stage: int, after: int, until: int) -> list[Checkpoint]:
        """All of :meth:`checkpoints`."""
        # Asked for by each KV cache group of a stage in turn.
        asked = stage, after, until
        if self._passed[0] != asked:
            self._passed = asked, [*self.checkpoints(*asked)]
        return self._passed[1]

    def checkpoints(self, stage: int, after: int, until: int) -> Iterator[Checkpoint]:
        """Those in (after, until], ascending; ``after`` is one, or 0."""
        slots = self.plan.num_slots(after, stage)
        length = self._find_next(after)
        while length <= until:
            first, slots = slots // self.block_size, self.plan.num_slots(length, stage)
            last = cdiv(slots, self.block_size) - 1
            key = self._span_ends.get(length) or self[length // self.block_size - 1]
            # The prefix names its last block. Other blocks that it fills add their place.
            keys = [(i, BlockHash(key + i.to_bytes(4))) for i in range(first, last)]
            yield Checkpoint(length, slots, [*keys, (last, key)])
            length = self._find_next(length)
