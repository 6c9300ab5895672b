"""How many requests run at once in a KV cache of a given size."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Concurrency:
    """Requests that ran at once, without requests that were preempted afterwards.

    Attributes:
        preemptions: How often a running request lost its KV cache.
    """

    def __init__(self) -> None:
        self.preemptions = 0
        self._steps: list[set[str]] = []

    def step(self, running: set[str]) -> None:
        self._steps.append(running)

    def preempt(self, request_id: str) -> None:
        self.preemptions += 1
        for running in self._steps:
            running.discard(request_id)

    @property
    def most(self) -> int:
        return max(map(len, self._steps), default=0)


@contextmanager
def observed(scheduler: Any) -> Iterator[Concurrency]:
    """Watch a vLLM scheduler; a request runs once its prompt is all computed.

    Before, it may be in the running queue with only the text before its image.
    """
    concurrency = Concurrency()
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def observed_schedule(*args: Any, **kwargs: Any) -> Any:
        scheduled = schedule(*args, **kwargs)
        running = (r for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens)
        concurrency.step({request.request_id for request in running})
        return scheduled

    def observed_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        concurrency.preempt(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = observed_schedule, observed_preempt
    try:
        yield concurrency
    finally:
        del scheduler.schedule, scheduler._preempt_request


@contextmanager
def kv_memory(scheduler: Any, budget: int) -> Iterator[None]:
    """Leave a vLLM scheduler free blocks for ``budget`` KV slots times layers, in whole blocks.

    Raises:
        ValueError: If it has fewer.
    """
    manager = scheduler.kv_cache_manager
    groups = manager.kv_cache_config.kv_cache_groups
    # A block has room for the layers of the largest group, whichever group it is given to.
    layers = max(len(group.layer_names) for group in groups)
    blocks = budget // (groups[0].kv_cache_spec.block_size * layers)
    spare = manager.block_pool.get_num_free_blocks() - blocks
    if spare < 0:
        raise ValueError(f"{-spare} more KV blocks are needed; raise --kv-cache-gib")
    taken = manager.block_pool.get_new_blocks(spare)
    try:
        yield
    finally:
        manager.block_pool.free_blocks(taken)
