"""What pruning should save, by arithmetic."""

from pathlib import Path

import pytest
import yaml

from benchmarks.asks import Ask
from benchmarks.ideals import (
    KV_BLOCK,
    ImagePlan,
    StockCosts,
    ideal_capacity,
    ideal_prefill,
    kv_budget,
)
from vitcop_vllm.demo.checkpoint import DEMO, LLAVA_1_5_7B, LLAVA_1_5_13B
from vitcop_vllm.pruning.settings import PruningSettings


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


@pytest.mark.parametrize(
    ("ratio", "average"), [(0.0, 576), (2 / 3, 192.1), (7 / 9, 127.8), (8 / 9, 63.6)]
)
def test_the_published_plans(ratio, average):
    plan = ImagePlan.of(LLAVA_1_5_7B, ratio, "vitcop")
    assert plan.average == pytest.approx(average, abs=0.06)
    assert plan.layers == (2, 20, 10)
    # A prompt is as much text as before, and its images' share of tokens goes.
    assert plan.share(0) == pytest.approx(average / 576, abs=1e-3)
    assert plan.share(576) == pytest.approx((576 + average) / 1152, abs=1e-3)
    assert plan.share(576 * 8, images=8) == plan.share(576)


def test_plans_of_the_13b_are_those_it_is_served_with():
    served = yaml.safe_load(Path("configs/llava-1.5-13b.yaml").read_text())["pruning"]
    shallow, deep = PruningSettings(**served).boundaries(LLAVA_1_5_13B.layers)
    plan = ImagePlan.of(LLAVA_1_5_13B, 8 / 9, "vitcop")
    assert plan.layers == (shallow, deep - shallow, 40 - deep)


def test_peers_have_as_many_tokens_in_every_layer():
    ours = ImagePlan.of(DEMO, 8 / 9, "vitcop")
    peer = ImagePlan.of(DEMO, 8 / 9, "cls")
    assert len(set(peer.counts.stages)) == 1
    assert peer.average == pytest.approx(ours.average, rel=0.03)


def test_the_encoder_costs_the_same_whatever_survives():
    assert ideal_prefill(10.0, 2.0, 0.25) == 4.0
    assert ideal_prefill(10.0, 2.0, 1.0) == 10.0
    # Timed in another run it may have taken longer than all of this one.
    assert ideal_prefill(1.0, 2.0, 0.25) == 2.0


COSTS = StockCosts(encoder=288.0, token=1.0, step=2.0, text_step=1.0)
KEPT = ImagePlan.of(DEMO, 8 / 9, "vitcop").average / 576


@pytest.mark.parametrize("drift", [1.0, 3.0])
def test_prefill_and_decode_steps_are_scaled_by_what_plans_keep(drift):
    one = [Ask("", (1,), 8 / 9, 5)]
    # A third of prefill is the encoder's, half of a decode step is the image's.
    prefill = COSTS.ideal_serving(DEMO, one, [576], 30.0 * drift, 0.0)
    assert prefill == pytest.approx(drift * (10 + 20 * KEPT))
    both = COSTS.ideal_serving(DEMO, one, [576], 70.0 * drift, 40.0 * drift)
    assert both == pytest.approx(drift * (10 + 20 * KEPT + 20 + 20 * KEPT))


def test_requests_count_as_much_as_they_ask_for():
    whole, pruned = Ask("", (1,), 0.0, 3), Ask("", (1,), 8 / 9, 7)
    assert COSTS.ideal_serving(DEMO, [whole], [576], 40.0, 20.0) == 40.0
    # Three quarters of decode steps' tokens are the pruned one's, and half of the prompts'.
    both = COSTS.ideal_serving(DEMO, [whole, pruned], [576, 576], 40.0, 20.0)
    assert both == pytest.approx(
        20 * (1 + 2 * (1 + KEPT) / 2) / 3 + 20 * (1 - 0.75 * (1 - KEPT) / 2)
    )


def test_a_image_never_makes_a_step_faster():
    costs = StockCosts(encoder=1.0, token=1.0, step=2.0, text_step=2.1)
    one = [Ask("", (1,), 8 / 9, 5)]
    assert costs.ideal_serving(DEMO, one, [576], 20.0, 20.0) == 20.0
