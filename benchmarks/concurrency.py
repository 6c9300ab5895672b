"""Number of concurrent requests in a KV cache of a given size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch


@dataclass
class Concurrency:
    """Requests that ran at once.

    Attributes:
        steps: Running requests of each step. A request that is preempted later does not count.
        preemptions: Number of preemptions.
    """

    steps: list[set[str]] = field(default_factory=list)
    preemptions: int = 0

    @property
    def max_running(self) -> int:
        return max(map(len, self.steps), default=0)


@contextmanager
def observe(scheduler: Any) -> Iterator[Concurrency]:
    """Record the concurrency of a vLLM scheduler.

    A request counts once its whole prompt is computed. Before, it may be in the running queue
    with only the text in front of its image.
    """
    concurrency = Concurrency()
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def observed_schedule(*args: Any, **kwargs: Any) -> Any:
        scheduled = schedule(*args, **kwargs)
        running = (r for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens)
        concurrency.steps.append({request.request_id for request in running})
        return scheduled

    def observed_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        concurrency.preemptions += 1
        for running in concurrency.steps:
            running.discard(request.request_id)
        return preempt(request, *args, **kwargs)

    with patch.multiple(scheduler, schedule=observed_schedule, _preempt_request=observed_preempt):
        yield concurrency


@contextmanager
def limit_kv_memory(scheduler: Any, budget: int) -> Iterator[None]:
    """Limit a vLLM scheduler's free blocks to ``budget`` KV slots times layers, rounded down.

    Raises:
        ValueError: If fewer blocks are free.
    """
    manager = scheduler.kv_cache_manager
    groups = manager.kv_cache_config.kv_cache_groups
    # Every block has room for the layers of the largest group.
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
