"""What Stage I's functions cost: the arithmetic it is held against, and the document."""

import json
from dataclasses import replace

import pytest

from benchmarks.qwen_checkpoint import QWEN2_5_VL_7B, TINY
from benchmarks.stage_one_cost import main, measure, prefill_flops


def test_the_arithmetic_of_a_prefill():
    # Text alone: two operations a weight and token; the 7B's decoder layers hold 6.5e9 weights.
    text = prefill_flops(QWEN2_5_VL_7B, 0, 100)
    assert text == pytest.approx(2 * 6.525e9 * 100, rel=0.01)
    # Per patch of a small image, the encoder's 0.63e9 weights in layers.
    few, more = (prefill_flops(QWEN2_5_VL_7B, tokens, 0) for tokens in (16, 32))
    assert few == pytest.approx(2 * (6.525e9 * 16 + 0.63e9 * 64), rel=0.03)
    assert 2 * few < more < 2.01 * few
    # Large images: attention over the whole image, four patches a token.
    whole, windowed = (
        prefill_flops(replace(QWEN2_5_VL_7B, full_attention=layers), 16_384, 0)
        for layers in (QWEN2_5_VL_7B.full_attention, ())
    )
    assert whole - windowed == pytest.approx(4 * 4 * 65_536**2 * 1280, rel=0.01)


def test_shares_are_of_the_prefill():
    row = measure(TINY, 256, 1)
    assert row["visual_tokens"] == 256
    assert 0 < row["kept"] < 256
    assert row["clustering_seconds"] > 0 < row["received_seconds"]
    assert row["clustering_share"] == row["clustering_seconds"] / row["prefill_seconds"]
    assert row["received_share_spread"] == [row["received_share"]] * 2


def test_the_document(capsys):
    argv = ["--shape", "qwen2.5-vl-small", "--rounds", "1", "--visual-tokens", "64", "100"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["visual_tokens"] for row in document["rows"]] == [64, 100]
    assert document["conditions"]["shape"] == "qwen2.5-vl-small"
