"""The HTTP load: its servers, its requests, and runs against a real server."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import yaml
from vllm.tokenizers import get_tokenizer

from benchmarks import traffic
from benchmarks.traffic import both_servers
from vitcop_server.bench import RequestsFailedError
from vitcop_vllm.demo.checkpoint import DEMO_MODEL


@pytest.fixture
def started(monkeypatch):
    """Replaces servers. Holds configuration and other flags of each, stock vLLM first."""
    servers = []

    @contextmanager
    def running_server(flag, path, *flags, stock):
        assert flag == "--config"
        with open(path) as file:
            servers.append((yaml.safe_load(file), flags))
        yield ("http://stock" if stock else "http://ours"), None

    monkeypatch.setattr(traffic, "running_server", running_server)
    return servers


def read_config(name: str):
    with open(f"configs/{name}.yaml") as file:
        return yaml.safe_load(file)


def test_stock_gets_all_options_except_our_sections(started):
    config = read_config("demo-cpu")
    with both_servers(config) as (stock, ours):
        pass
    [(stock_config, _), (our_config, _)] = started
    assert stock_config.keys() == config.keys() - {"pruning", "server"}
    assert our_config == {**config, "model": str(DEMO_MODEL)}
    assert stock_config["model"] == stock.tokenizer == ours.tokenizer == str(DEMO_MODEL)
    assert (stock.url, ours.url, ours.model) == ("http://stock", "http://ours", "demo")


@pytest.mark.parametrize("name", ["demo-cpu", "demo-gpu", "llava-1.5-7b", "llava-1.5-13b"])
def test_two_servers_share_a_gpu_unless_configured(name, started):
    config = read_config(name)
    with both_servers(config):
        pass
    is_unlimited = not {"kv-cache-memory-bytes", "gpu-memory-utilization"} & config.keys()
    assert is_unlimited == name.startswith("llava")
    share = traffic.HALF_A_GPU if is_unlimited else ()
    assert [flags for _, flags in started] == [(*share, *traffic.NO_IMAGE_CACHE)] * 2
    with both_servers({**config, "gpu_memory_utilization": 0.3}):
        pass
    assert [flags for _, flags in started[2:]] == [traffic.NO_IMAGE_CACHE] * 2


def test_neither_server_caches_prepared_images(started):
    with both_servers(read_config("demo-cpu")):
        pass
    assert [flags for _, flags in started] == [("--mm-processor-cache-gb", "0")] * 2


def test_requests_have_an_image_or_text_instead():
    tokenizer = get_tokenizer(str(DEMO_MODEL))
    run = traffic.Traffic(requests=64, answer_tokens=16)
    images = traffic.sample_requests(tokenizer, replace(run, ratios=(0.5, 0.75)), 11, 12)
    assert all(len(request.multi_modal_data) == 1 for request in images)
    assert [request.request_overrides["pruning_ratio"] for request in images[:3]] == [
        0.5,
        0.75,
        0.5,
    ]
    lengths = [request.expected_output_len for request in images]
    assert {*lengths} == {*range(8, 25)}
    others = traffic.sample_requests(tokenizer, run, 11, 13)
    assert [request.expected_output_len for request in others] == lengths
    every = [*images, *others]
    assert len({str(request.multi_modal_data) for request in every}) == len(every)
    assert len({request.request_overrides["cache_salt"] for request in every}) == len(every)
    text = traffic.sample_requests(tokenizer, replace(run, text_tokens=100), 11, 12)
    assert [request.expected_output_len for request in text] == lengths
    for request in text:
        assert not request.multi_modal_data
        assert request.request_overrides.keys() == {"cache_salt"}
        assert request.prompt_len == pytest.approx(140, abs=14)
        assert "<image>" not in request.prompt, "the server would expect an image"


@pytest.mark.slow
def test_failed_requests_end_the_run(demo_url):
    ours = traffic.Endpoint(demo_url, "demo", str(DEMO_MODEL))
    run = traffic.Traffic(requests=4, answer_tokens=4, clients=2)
    with pytest.raises(RequestsFailedError, match="4 requests failed"):
        traffic.serve(ours, replace(run, ratios=(0.99,)), 11, 12)


@pytest.mark.slow
def test_each_request_has_its_own_ratio(demo_url):
    ours = traffic.Endpoint(demo_url, "demo", str(DEMO_MODEL))
    assert ours.kept_tokens(0.0) == (576, 576)
    visual, kept = ours.kept_tokens(8 / 9)
    assert visual == 576
    assert kept == pytest.approx(64, abs=1)
    run = traffic.Traffic(requests=4, answer_tokens=4)
    mixed = traffic.serve(ours, replace(run, ratios=(0.0, 8 / 9)), 11, 12)
    assert mixed["completed"] == 4
    assert 0 < mixed["median_ttft_ms"] <= mixed["p99_ttft_ms"]
    text = traffic.serve(ours, replace(run, text_tokens=100), 11, 13)
    assert text["total_input_tokens"] == pytest.approx(4 * 140, rel=0.05)
