"""vLLM's serving benchmark, driven by us: what it is told, and that it runs."""

import json

import httpx
import pytest
import yaml

from benchmarks import bench_http
from benchmarks.bench_http import Target, memory_share, request_arguments, stock_options
from vitcop_vllm.demo.checkpoint import DEMO_MODEL


def test_stock_gets_the_same_options_but_ours():
    with open("configs/demo-cpu.yaml") as file:
        config = yaml.safe_load(file)
    options = stock_options(config)
    assert options.keys() == config.keys() - {"pruning", "server"}
    assert options["model"] == str(DEMO_MODEL)
    assert options["max-num-seqs"] == config["max-num-seqs"]


@pytest.mark.parametrize("name", ["demo-cpu", "demo-gpu", "llava-1.5-7b", "llava-1.5-13b"])
def test_two_servers_share_what_one_would_take(name):
    with open(f"configs/{name}.yaml") as file:
        options = stock_options(yaml.safe_load(file))
    takes_all = not {"kv-cache-memory-bytes", "gpu-memory-utilization"} & options.keys()
    assert takes_all == name.startswith("llava")
    assert (memory_share(options) != ()) == takes_all
    assert memory_share({"gpu_memory_utilization": 0.3}) == ()


def test_only_ours_is_told_a_ratio():
    stock, ours = Target("stock", "http://a", None), Target("8/9", "http://b", "0.888889")
    arguments = [request_arguments(target, "m", "t", 4, 8, 3) for target in (stock, ours)]
    assert "--header" not in arguments[0]
    place = arguments[1].index("--header")
    assert arguments[1][place + 1] == "X-Pruning-Ratio=0.888889"
    del arguments[1][place : place + 2]
    arguments[1][arguments[1].index("http://b")] = "http://a"
    assert arguments[0] == arguments[1]


@pytest.mark.slow
def test_a_running_server(demo_url, capsys):
    def served() -> float:
        lines = httpx.get(f"{demo_url}/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith('vitcop_requests_total{ratio="0.8-'))
        return float(line.split()[-1])

    options = ["--ratios", "8/9", "--clients", "2", "--requests", "4", "--rounds", "1"]
    assert bench_http.main(["--url", demo_url, *options]) == 0
    before = served()
    assert bench_http.main(["--url", demo_url, *options, "--seed", "5"]) == 0
    assert served() == before + 8 + 4  # to warm up, and the run
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = document["clients"]["2"]["8/9"]
    assert row["requests_per_second"] > 0
    assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]


@pytest.mark.slow
def test_requests_that_fail_are_told(demo_url, capsys):
    options = ["--ratios", "0.99", "--clients", "2", "--requests", "4", "--rounds", "1"]
    assert bench_http.main(["--url", demo_url, *options]) == 1
    assert "8 of 8 requests failed" in capsys.readouterr().err
