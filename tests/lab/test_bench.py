"""The bench's arithmetic; what it measures, nobody can know beforehand."""

from random import Random
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest

from vitcop_vllm.demo.checkpoint import DEMO
from vitcop_vllm.lab import load
from vitcop_vllm.lab.bench import GOALS, goals_met
from vitcop_vllm.lab.concurrency import Concurrency, kv_memory, observed
from vitcop_vllm.lab.scenarios import KV_BLOCK, Rounds, ideal_capacity, kv_budget, summary


def test_ideal_capacity():
    assert ideal_capacity(16_000, 100, 16) == 10
    assert ideal_capacity(16_000, 62.5, 16) == 16
    # A request that takes half the memory fits twice as often, whatever the layers.
    assert ideal_capacity(kv_budget(640, 24), 640, 24) == ideal_capacity(kv_budget(640, 7), 640, 7)


@pytest.mark.parametrize("unpruned", [1, 128, 129, 653])
def test_the_kv_budget_is_in_whole_blocks_of_every_size(unpruned):
    budget = kv_budget(unpruned, 16)
    assert budget % (KV_BLOCK * 16) == 0
    assert 8 <= ideal_capacity(budget, unpruned, 16) < 8 * (unpruned + KV_BLOCK) / unpruned


def test_poisson_arrivals():
    arrivals = load.poisson_arrivals(5.0, 20_000, Random(3))
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(1 / 5, rel=0.03)
    # Of an exponential distribution, and of no regular one.
    assert mean(gap * gap for gap in gaps) == pytest.approx(2 / 5**2, rel=0.06)
    assert arrivals == load.poisson_arrivals(5.0, 20_000, Random(3))
    assert arrivals != load.poisson_arrivals(5.0, 20_000, Random(4))


def test_mixed_ratios():
    ratios = load.mixed_ratios(load.REQUESTS, Random(0))
    assert mean(ratios) == pytest.approx(8 / 9, abs=1e-12)
    assert set(ratios) == {7 / 9, 8 / 9, 17 / 18}
    assert ratios == load.mixed_ratios(load.REQUESTS, Random(0))
    assert ratios != load.mixed_ratios(load.REQUESTS, Random(1))
    assert ratios != sorted(ratios)


def test_mixed_asks():
    arrivals = [0.5 * i for i in range(load.REQUESTS)]
    asks = load.mixed_asks(range(load.REQUESTS), arrivals, Random(0))
    assert [ask.picture for ask in asks] == list(range(load.REQUESTS))
    assert [ask.arrival for ask in asks] == arrivals
    assert {ask.prompt.count("<image>") for ask in asks} == {1}
    assert min(ask.max_tokens for ask in asks) >= 4
    assert max(ask.max_tokens for ask in asks) <= 32
    assert mean(ask.max_tokens for ask in asks) == pytest.approx(18, abs=3)
    assert asks == load.mixed_asks(range(load.REQUESTS), arrivals, Random(0))


def test_summary():
    figures = {"a": [3.0, 1.0, 2.0], "b": [4.0]}
    assert summary(figures, ["a"]) == {"a": 2.0, "b": 4.0, "a_spread": [1.0, 3.0]}


def test_the_engines_take_turns_at_going_first():
    stock: Any = SimpleNamespace(name="stock")
    ours: Any = SimpleNamespace(name="ours")
    rounds = Rounds(stock, ours, DEMO, 3, SimpleNamespace(update=lambda: None))
    order = []

    def serve(engine, argument):
        order.append(engine.name)
        return {"engine": engine.name, "argument": argument}

    for _ in rounds:
        assert rounds.both(serve, 1, 2) == (
            {"engine": "stock", "argument": 1},
            {"engine": "ours", "argument": 2},
        )
    assert order == ["stock", "ours", "ours", "stock", "stock", "ours"]
    assert not {*rounds.pictures(3)} & {*rounds.pictures(3)}


def test_preempted_requests_did_not_run_at_once():
    concurrency = Concurrency()
    assert concurrency.most == 0
    concurrency.step("ab")
    concurrency.step("abcd")
    concurrency.preempt("d")
    concurrency.preempt("c")
    assert (concurrency.most, concurrency.preemptions) == (2, 2)
    concurrency.step("abc")
    concurrency.step("cd")
    assert concurrency.most == 3


class FakeScheduler:
    """Runs as many more requests in each step."""

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


def test_requests_run_once_their_prompt_is_computed():
    scheduler = FakeScheduler(1)
    with observed(scheduler) as concurrency:
        assert scheduler.schedule("a", 10) == "a"
        scheduler.schedule("b", 9)
        assert concurrency.most == 1
        scheduler.schedule("c", 12)
        assert concurrency.most == 2
        assert scheduler._preempt_request(scheduler.running[-1], 4.5) == 4.5
        assert (concurrency.most, concurrency.preemptions) == (1, 1)
    scheduler.schedule("d", 10)
    scheduler.schedule("e", 10)
    assert concurrency.most == 1


def test_kv_memory_is_counted_in_slots_times_layers():
    scheduler = FakeScheduler(4, 4, 3)
    with kv_memory(scheduler, 7 * 32 * 4 + 5):
        assert scheduler.free == 7
    assert scheduler.free == 100
    with pytest.raises(ValueError, match="1 more KV blocks"), kv_memory(scheduler, 101 * 32 * 4):
        pass


def test_goals():
    document = {
        "turns": {"2/3": {"ttft": 0.9}, "8/9": {"ttft": 1.06}},
        "capacity": {"0": {"vs_ideal": 0.5}, "8/9": {"vs_ideal": 0.95}},
        "load": {"throughput": 3.5, "ttft_p50": 0.2, "ttft_p99": 1.0},
    }
    met = {name: goal["met"] for name, goal in goals_met(document).items()}
    assert met == {
        "second_turn_ttft": False,
        "capacity_vs_ideal_at_8/9": True,
        "load_throughput": True,
        "load_ttft_p50": True,
        "load_ttft_p99": False,
    }
    prefill = [{"vs_ideal": 0.9, "stages_share": 0.01}, {"vs_ideal": 1.1, "stages_share": 0.03}]
    decode = {"0": {"1": {"throughput": 1.0}}, "8/9": {"1": {"decode_latency": 1.0}}}
    whole = goals_met({**document, "prefill": prefill, "decode": decode})
    assert list(whole) == list(GOALS)
    assert whole["prefill_vs_ideal"] == {"figure": 0.9, "goal": ">= 1.0", "met": False}
    assert not whole["stages_share_of_unpruned_prefill"]["met"]
