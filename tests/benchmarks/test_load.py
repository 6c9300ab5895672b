"""Load on fake servers whose time follows the plan exactly, so that every ideal is met."""

from statistics import mean

import pytest

from benchmarks import load
from benchmarks.traffic import Endpoint, Traffic

OURS, STOCK = Endpoint("http://ours", "m", "t"), Endpoint("http://stock", "m", "t")
ENCODER, TOKEN, TEXT, V = 0.5, 1e-3, 40, 576
"""Seconds per image and per token; tokens of a question and of an image."""

EXACTLY_ONE = pytest.approx(1.0, abs=1e-9)


@pytest.fixture
def runs(monkeypatch):
    """Replaces servers, and records their runs."""
    seen = []

    def kept_tokens(self, ratio):
        assert self is OURS, "stock vLLM has no plan"
        return V, round(V * (1 - ratio))

    def serve(server, traffic: Traffic, seed, content):
        ratios, text_tokens = traffic.ratios, traffic.text_tokens
        seen.append((server, traffic, seed, ratios, content))
        visual = mean(kept_tokens(OURS, ratio)[1] for ratio in ratios or (0.0,))
        image = ENCODER + round(visual) * TOKEN if text_tokens is None else text_tokens * TOKEN
        seconds = traffic.requests * (image + TEXT * TOKEN)
        seconds = max(seconds, traffic.requests / traffic.rate)
        return {
            "duration": seconds,
            "request_throughput": traffic.requests / seconds,
            "median_ttft_ms": seconds * 500,
            "p99_ttft_ms": seconds * 1000,
            "median_tpot_ms": 1.0,
        }

    monkeypatch.setattr(Endpoint, "kept_tokens", kept_tokens)
    monkeypatch.setattr(load, "serve", serve)
    return seen


@pytest.mark.parametrize("clients", load.CLIENTS)
def test_mixed_ratios_are_equally_frequent(clients):
    ratios = load.ratios_of(load.MIXED)
    assert mean(ratios) == pytest.approx(8 / 9, abs=1e-12)
    assert clients * load.REQUESTS_PER_CLIENT % len(ratios) == 0
    assert load.ratios_of("2/3") == (2 / 3,)


def test_clients_meet_their_ideal(runs):
    rows = [*load.measure_load(OURS, STOCK, rounds=2, answer_tokens=4, clients=(16,))]
    assert [(row["clients"], row["ratio"]) for row in rows] == [(16, r) for r in load.RATIOS]
    for row in rows:
        assert row["vs_ideal"] == EXACTLY_ONE
        assert row["throughput"] == pytest.approx(1 / row["ttft_p99"])
        assert "rate" not in row
    unpruned, *pruned = rows
    assert unpruned["throughput"] == unpruned["ideal"] == 1.0
    assert 1 < pruned[0]["throughput"] < pruned[1]["throughput"]
    seconds = ENCODER + (V + TEXT) * TOKEN
    pruned_seconds = ENCODER + (64 + TEXT) * TOKEN
    assert pruned[1]["ideal"] == pytest.approx(seconds / pruned_seconds)
    # All runs of a round have the same seed, but no run has prompts that a cache may hold.
    seeds = [{seed for _, traffic, seed, *_ in runs if traffic.clients == 16}]
    assert len(*seeds) == 2
    assert len({content for *_, content in runs}) == len(runs)
    assert all(ratios is None for server, _, _, ratios, _ in runs if server is STOCK)


def test_arrivals_are_relative_to_stock_s_throughput(runs):
    rows = load.measure_load(
        OURS, STOCK, rounds=2, answer_tokens=4, clients=(4, 16), rates=load.RATES, ratios=["8/9"]
    )
    few, many, *arrivals = rows
    assert (few["clients"], many["clients"]) == (4, 16)
    assert [row["rate"] for row in arrivals] == list(load.RATES)
    for row in arrivals:
        assert row["clients"] == 16
        stock_rate = many["stock_requests_per_second"]
        assert row["arrivals_per_second"] == row["rate"] * stock_rate
        assert row["vs_ideal"] == EXACTLY_ONE
    slow, _, fast = arrivals
    # Stock is idle half of the time: the last request's arrival limits both.
    assert slow["throughput"] == slow["ideal"] == EXACTLY_ONE
    assert fast["throughput"] == pytest.approx(many["throughput"])
    assert {traffic.clients for _, traffic, *_ in runs if traffic.rate < 1e9} == {None}
