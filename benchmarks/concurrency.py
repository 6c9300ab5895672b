"""How many requests run at once in a KV cache of a given size."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Concurrency:
    """Requests that ran at once, those left out that were preempted afterwards.

    Attributes:
        preemptions: How often a running request lost its KV cache.
    """

    def __init__(self) -> None:
        self.preemptions = 0
        self._steps: list[set[str]] = []

    def step(self, running: Iterable[str]) -> None:
        """Take down who runs in a step."""
        self._steps.append(set(running))

    def preempt(self, request_id: str) -> None:
        """What a request has run so far is lost, and counts no more."""
        self.preemptions += 1
        for running in self._steps:
            running.discard(request_id)

    @property
    def most(self) -> int:
        return max(map(len, self._steps), default=0)


@contextmanager
def observed(scheduler: Any) -> Iterator[Concurrency]:
    """Take down what a vLLM scheduler does; a request runs once its prompt is all computed.

    Before, it may be in the running queue with only the text before its image.
    """
    concurrency = Concurrency()
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def observed_schedule(*args: Any, **kwargs: Any) -> Any:
        scheduled = schedule(*args, **kwargs)
        concurrency.step(
            request.request_id
            for request in scheduler.running
            if request.num_computed_tokens >= request.num_prompt_tokens
        )
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
    pool = manager.block_pool
    spare = pool.get_num_free_blocks() - blocks
    if spare < 0:
        raise ValueError(f"{-spare} more KV blocks are needed; raise --kv-cache-gib")
    taken = pool.get_new_blocks(spare)
    try:
        yield
    finally:
        pool.free_blocks(taken)
