"""The overload of a fake server, and the mean ratio from a server's counters."""

from collections import Counter

import pytest

from benchmarks import elastic
from benchmarks.traffic import Endpoint, Traffic
from vitcop_server.bench import RequestsFailedError
from vitcop_server.elastic import check_elastic
from vitcop_server.settings import ServerSettings
from vitcop_vllm.pruning.settings import PruningSettings

SERVER = Endpoint("http://ours", "m", "t")
CONFIG = {
    "default_ratio": 0.0,
    "settings": {"default_ratio": 0.0},
    "first_layers": [0, 2, 6],
    "num_layers": 8,
}


@pytest.fixture
def runs(monkeypatch):
    """Replaces the server: it refuses requests at ratio 0 that arrive too fast."""
    seen = []
    counters: elastic.Counters = Counter()

    def serve(server, traffic, seed, content, *, may_fail=False):
        ratios = traffic.ratios
        seen.append((traffic, seed, ratios, content))
        failed = 10 if may_fail and ratios == (0.0,) else 0
        for stage, kept in (("I", 30), ("II", 20), ("III", 10)):
            share = 100 if ratios == (0.0,) else kept
            counters["vitcop_visual_tokens_kept_total", stage] += share
            counters["vitcop_visual_tokens_dropped_total", stage] += 100 - share
        counters[elastic.REFUSED] += failed
        return {
            "failed": failed,
            "request_throughput": 4.0,
            "median_ttft_ms": 1.0,
            "p99_ttft_ms": 2.0,
        }

    monkeypatch.setattr(elastic, "serve", serve)
    monkeypatch.setattr(elastic, "_config", lambda server: CONFIG)
    monkeypatch.setattr(elastic, "_counters", lambda server: counters.copy())
    return seen


def test_each_case_has_the_same_overload(runs):
    rows = elastic.measure_elastic(SERVER, rounds=3, answer_tokens=4, clients=8)
    assert [row["ratio"] for row in rows] == ["0", "8/9", "elastic"]
    assert [row["refused"] for row in rows] == [30, 0, 0]
    assert rows[0]["mean_ratio"] == 0
    # 0.7 in 2 layers, 0.8 in 4 and 0.9 in 2.
    assert rows[2]["mean_ratio"] == pytest.approx(0.8)
    for row in rows:
        assert row["unpruned_requests_per_second"] == 4.0
        assert row["arrivals_per_second"] == 8.0
        assert row["requests"] == 64
    _, closed, *measured = runs
    assert (closed[0].clients, closed[2]) == (8, (0.0,))
    assert {(traffic.clients, traffic.rate) for traffic, *_ in measured} == {(None, 8.0)}
    assert len({(seed, ratios) for _, seed, ratios, _ in measured}) == 9
    assert len({seed for _, seed, *_ in measured}) == 3
    assert len({content for *_, content in runs}) == len(runs), "a cache would hold a prompt"


def test_counters_are_summed_over_modalities():
    text = (
        "# HELP vitcop_visual_tokens_kept_total Visual tokens\n"
        "# TYPE vitcop_visual_tokens_kept_total counter\n"
        'vitcop_visual_tokens_kept_total{modality="image",stage="I"} 30.0\n'
        'vitcop_visual_tokens_kept_total{modality="video",stage="I"} 12.0\n'
        'vitcop_visual_tokens_dropped_total{modality="image",stage="III"} 1.0e+06\n'
        'vitcop_visual_tokens_kept_created{modality="image",stage="I"} 1.7e+09\n'
        'vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"} 3.0\n'
        'vllm:admission_rejections_total{model_name="m",reason="max_num_queued_tokens"} 0.0\n'
    )
    assert elastic.counters_in(text) == {
        ("vitcop_visual_tokens_kept_total", "I"): 42,
        ("vitcop_visual_tokens_dropped_total", "III"): 10**6,
        elastic.REFUSED: 3,
    }


def test_other_failures_end_the_run(runs, monkeypatch):
    failures = {"failed": 1, "errors": ["it broke"]}
    monkeypatch.setattr(elastic, "serve", lambda *args, **options: failures)
    with pytest.raises(RequestsFailedError, match="it broke"):
        elastic._serve(SERVER, Traffic(1, 1), 0, 0)


@pytest.mark.parametrize("clients", [8, 16, 32])
def test_a_server_accepts_the_options(clients):
    from vitcop_server.arguments import make_parser

    options = elastic.elastic_options(clients)
    server = ServerSettings.model_validate(options["server"])
    flags = ["m", "--max-num-queued-reqs", str(options["max_num_queued_reqs"])]
    args = make_parser().parse_args(flags)
    assert server.elastic is not None
    check_elastic(server.elastic, PruningSettings(), args, 1)
