"""Counting concurrent requests, and limiting a scheduler's KV memory."""

from types import SimpleNamespace

import pytest

from benchmarks.concurrency import limit_kv_memory, observe


class FakeScheduler:
    """Adds a request to the running queue in each step."""

    def __init__(self, *group_sizes):
        self.running = []
        groups = [
            SimpleNamespace(
                layer_names=["layer"] * size, kv_cache_spec=SimpleNamespace(block_size=32)
            )
            for size in group_sizes
        ]
        self.free = 100
        self.kv_cache_manager = SimpleNamespace(
            kv_cache_config=SimpleNamespace(kv_cache_groups=groups), block_pool=self
        )

    def schedule(self, name, computed):
        self.running.append(
            SimpleNamespace(request_id=name, num_computed_tokens=computed, num_prompt_tokens=10)
        )
        return name

    def _preempt_request(self, request, timestamp):
        self.running.remove(request)
        return timestamp

    def get_num_free_blocks(self):
        return self.free

    def get_new_blocks(self, number):
        self.free -= number
        return [None] * number

    def free_blocks(self, blocks):
        self.free += len(blocks)


def test_requests_count_once_their_prompt_is_computed():
    scheduler = FakeScheduler(1)
    with observe(scheduler) as concurrency:
        assert concurrency.max_running == 0
        assert scheduler.schedule("a", 10) == "a"
        scheduler.schedule("b", 9)
        assert concurrency.max_running == 1
        scheduler.schedule("c", 12)
        assert concurrency.max_running == 2
        assert scheduler._preempt_request(scheduler.running[-1], 4.5) == 4.5
        assert (concurrency.max_running, concurrency.preemptions) == (1, 1)
    scheduler.schedule("d", 10)
    scheduler.schedule("e", 10)
    assert concurrency.max_running == 1


def test_kv_memory_is_counted_in_slots_times_layers():
    scheduler = FakeScheduler(4, 4, 3)
    with limit_kv_memory(scheduler, 7 * 32 * 4 + 5):
        assert scheduler.free == 7
    assert scheduler.free == 100
    with (
        pytest.raises(ValueError, match="1 more KV blocks"),
        limit_kv_memory(scheduler, 101 * 32 * 4),
    ):
        pass
