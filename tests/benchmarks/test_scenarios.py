"""Scenarios on fake engines whose time follows the plan, so that figures equal their ideals."""

from typing import Any

import pytest

from benchmarks import prefill, qwen_checkpoint, scenarios
from benchmarks.engines import OURS, PEER, STOCK
from benchmarks.ideals import ImagePlan
from benchmarks.requests import filler_text
from benchmarks.rounds import SCALED_DOWN, Rounds
from tests.benchmarks.fake_engines import CACHED, ENCODER, STEP, TOKEN, FakeEngine
from vitcop_vllm.demo.checkpoint import LLAVA_1_5_7B

SHAPE = LLAVA_1_5_7B
V = SHAPE.visual_tokens
EXACTLY_ONE = pytest.approx(1.0, abs=1e-9)


@pytest.fixture(params=[False, True], ids=["profiled-at-once", "profiled-apart"])
def rounds(request) -> Rounds:
    engines: dict[Any, Any] = {name: FakeEngine(name, SHAPE) for name in (STOCK, OURS, PEER)}
    return Rounds(engines, SHAPE, 2, profile_apart=request.param)


def average(ratio: float, selector: Any = OURS) -> float:
    return ImagePlan.of(SHAPE, ratio, selector).average


def test_prefill_meets_its_ideal(rounds):
    ours, peer = prefill.measure_prefill(rounds, "8/9", 4)
    assert (ours["selector"], peer["selector"]) == (OURS, PEER)
    assert ours["visual_tokens"] == [172, 77, 15]
    assert ours["vs_ideal"] == peer["vs_ideal"] == EXACTLY_ONE
    assert ours["ideal"] == pytest.approx(ours["speed_up"])
    assert ours["vs_ideal_spread"] == [EXACTLY_ONE, EXACTLY_ONE]
    # Text prompts of as many rows take as long.
    assert ours["vs_stock_rows"] == EXACTLY_ONE
    assert ours["stock_encoder_ms"] == pytest.approx(4 * ENCODER * 1e3)
    text = ours["text_tokens"]
    assert ours["stock_ms"] == pytest.approx(4 * (ENCODER + (text + V) * TOKEN) * 1e3)
    assert 0 < ours["stages_share"] < 0.001
    assert ours["vs_peer"] == pytest.approx(peer["ours_ms"] / ours["ours_ms"])
    assert "vs_peer" not in peer


def test_images_count_with_their_encoder_time(rounds):
    one, eight = (prefill.measure_prefill(rounds, "8/9", images=images)[0] for images in (1, 8))
    assert one["vs_ideal"] == eight["vs_ideal"] == eight["vs_stock_rows"] == EXACTLY_ONE
    assert eight["images"] == 8
    assert eight["stock_encoder_ms"] == pytest.approx(8 * ENCODER * 1e3)
    text = eight["text_tokens"]
    pruned = ENCODER * 8 + (text + 8 * average(8 / 9)) * TOKEN
    assert eight["ideal"] == pytest.approx((ENCODER * 8 + (text + 8 * V) * TOKEN) / pruned)


def test_long_text_lowers_the_ideal(rounds):
    [row, _] = prefill.measure_prefill(rounds, "8/9", question=filler_text(2048))
    assert row["vs_ideal"] == row["vs_stock_rows"] == EXACTLY_ONE
    text = row["text_tokens"]
    assert 2048 < text < 2100
    pruned = ENCODER + (text + average(8 / 9)) * TOKEN
    assert row["ideal"] == pytest.approx((ENCODER + (text + V) * TOKEN) / pruned)
    assert row["ideal"] < prefill.measure_prefill(rounds, "8/9", 1)[0]["ideal"]


@pytest.mark.parametrize("apart", [False, True])
def test_prefill_compares_with_scaled_down_images(apart):
    shape = qwen_checkpoint.SMALL
    engines: dict[Any, Any] = {name: FakeEngine(name, shape) for name in (STOCK, OURS)}
    rounds = Rounds(engines, shape, 2, profile_apart=apart)
    ours, scaled = prefill.measure_prefill(rounds, "8/9", 1, image_size=448)
    assert (ours["selector"], scaled["selector"]) == (OURS, SCALED_DOWN)
    assert ours["image_size"] == scaled["image_size"] == 448
    assert ours["vs_ideal"] == EXACTLY_ONE
    assert ours["vs_stock_rows"] == EXACTLY_ONE
    text = ours["text_tokens"]
    assert ours["stock_ms"] == pytest.approx((ENCODER + (text + 256) * TOKEN) * 1e3)
    # About as many tokens: a square of them.
    assert ours["average_tokens"] == pytest.approx(256 / 9, abs=1.0)
    assert scaled["average_tokens"] == 5**2
    assert scaled["speed_up"] * scaled["ours_ms"] == pytest.approx(ours["stock_ms"])
    assert ours["vs_scaled_down"] == pytest.approx(scaled["ours_ms"] / ours["ours_ms"])
    assert "vs_ideal" not in scaled
    # Only stock vLLM scales images down.
    sizes = {
        name: {r.image_size for run in engine.commands for r in run.get("requests", ())}
        for name, engine in engines.items()
    }
    assert sizes == {STOCK: {448, 5 * 28}, OURS: {448}}
    [unpruned] = prefill.measure_prefill(rounds, "0", 1, image_size=1344)
    assert unpruned["speed_up"] == EXACTLY_ONE
    assert unpruned["vs_ideal"] == EXACTLY_ONE
    assert unpruned["average_tokens"] == 2304
    assert rounds.shape == shape


def test_decode_meets_its_ideal(rounds):
    [row, peer] = scenarios.measure_decode(rounds, "8/9", 4, tokens=9)
    step = row["stock_decode_step_ms"] / 1e3
    assert step > STEP
    dropped = 4 * (V - average(8 / 9)) * CACHED
    assert row["decode_latency"] == pytest.approx((step - dropped) / step)
    # Approximately, because stock's text prompts have whole tokens.
    assert row["ideal_decode_latency"] == pytest.approx(row["decode_latency"], rel=1e-3)
    assert row["vs_ideal"] == pytest.approx(1.0, abs=1e-4)
    assert peer["vs_ideal"] == pytest.approx(1.0, abs=1e-4)
    assert row["throughput"] == pytest.approx(row["ideal"], rel=1e-4)
    assert row["ideal"] < prefill.measure_prefill(rounds, "8/9", 4)[0]["ideal"]
    unpruned = scenarios.measure_decode(rounds, "0", 1, tokens=9)[0]
    assert unpruned["throughput"] == unpruned["ideal"] == EXACTLY_ONE
    assert unpruned["decode_latency"] == unpruned["ideal_decode_latency"] == EXACTLY_ONE
    assert unpruned["same_tokens"] is True


def test_one_round_with_other_tokens_clears_same_tokens(rounds):
    ours = rounds.engines[OURS]
    images, calls = ours.images, []

    def other_tokens_in_round_1(**command):
        calls.append(1)  # call 1 is the warm-up
        return images(**command) | ({"tokens": [[-1]]} if len(calls) == 2 else {})

    ours.images = other_tokens_in_round_1
    assert scenarios.measure_decode(rounds, "0", 1, tokens=4)[0]["same_tokens"] is False


def test_a_second_turn_continues_the_first(rounds):
    [row] = scenarios.measure_turns(rounds, "2/3")
    first, second = rounds.engines[OURS].commands[-2:]
    (before,), (after,) = first["requests"], second["requests"]
    assert after.images == before.images
    assert after.prompt.startswith(before.prompt + "a" * scenarios.ANSWER_TOKENS)
    assert row["ttft"] == pytest.approx(row["ours_ttft_ms"] / row["stock_ttft_ms"])
    assert rounds.engines[PEER].commands == []


def test_capacity_meets_its_ideal(rounds):
    ours, peer = scenarios.measure_capacity(rounds, "8/9")
    # The memory of eight requests in whole blocks; fake engines have no blocks.
    assert 8 <= ours["stock_most"] == int(ours["stock_ideal"])
    assert 4 * ours["stock_most"] < ours["most"] == int(ours["ideal"])
    assert 0.95 < ours["vs_ideal"] <= 1
    assert ours["vs_peer"] == ours["most"] / peer["most"]
    for engine in rounds.engines.values():
        run = [command for command in engine.commands if command["what"] == "capacity"][-1]
        assert run["budget"] == ours["budget"]
