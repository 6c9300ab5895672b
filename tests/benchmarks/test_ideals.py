"""Ideal savings of pruning."""

from pathlib import Path

import pytest
import yaml

from benchmarks.ideals import (
    KV_BLOCK,
    ImagePlan,
    ideal_capacity,
    ideal_prefill,
    kv_budget,
)
from vitcop_vllm.demo.checkpoint import DEMO, LLAVA_1_5_7B, LLAVA_1_5_13B
from vitcop_vllm.pruning.settings import PruningSettings


def test_capacity_is_budget_over_request_size():
    assert ideal_capacity(16_000, 100, 16) == 10
    assert ideal_capacity(16_000, 62.5, 16) == 16
    # The number of layers cancels out.
    assert ideal_capacity(kv_budget(640, 24), 640, 24) == ideal_capacity(kv_budget(640, 7), 640, 7)


@pytest.mark.parametrize("unpruned", [1, 128, 129, 653])
def test_the_kv_budget_is_whole_blocks(unpruned):
    budget = kv_budget(unpruned, 16)
    assert budget % (KV_BLOCK * 16) == 0
    assert 8 <= ideal_capacity(budget, unpruned, 16) < 8 * (unpruned + KV_BLOCK) / unpruned


@pytest.mark.parametrize(
    ("ratio", "average"), [(0.0, 576), (2 / 3, 192.1), (7 / 9, 127.8), (8 / 9, 63.6)]
)
def test_plans_have_the_published_averages(ratio, average):
    plan = ImagePlan.of(LLAVA_1_5_7B, ratio, "vitcop")
    assert plan.average == pytest.approx(average, abs=0.06)
    assert plan.layers == (2, 20, 10)
    # Only visual tokens are dropped, no text.
    assert plan.share(0) == pytest.approx(average / 576, abs=1e-3)
    assert plan.share(576) == pytest.approx((576 + average) / 1152, abs=1e-3)
    assert plan.share(576 * 8, images=8) == plan.share(576)


def test_the_13b_has_the_boundaries_of_its_configuration_file():
    served = yaml.safe_load(Path("configs/llava-1.5-13b.yaml").read_text())["pruning"]
    shallow, deep = PruningSettings(**served).boundaries(LLAVA_1_5_13B.layers)
    plan = ImagePlan.of(LLAVA_1_5_13B, 8 / 9, "vitcop")
    assert plan.layers == (shallow, deep - shallow, 40 - deep)


def test_the_peer_has_equal_counts_and_the_same_average():
    ours = ImagePlan.of(DEMO, 8 / 9, "vitcop")
    peer = ImagePlan.of(DEMO, 8 / 9, "cls")
    assert len(set(peer.counts.stages)) == 1
    assert peer.average == pytest.approx(ours.average, rel=0.03)


def test_the_ideal_keeps_the_encoder_s_full_cost():
    assert ideal_prefill(10.0, 2.0, 0.25) == 4.0
    assert ideal_prefill(10.0, 2.0, 1.0) == 10.0
    # The encoder's time may come from another, slower run.
    assert ideal_prefill(1.0, 2.0, 0.25) == 2.0
