"""vLLM's serving benchmark: its requests, and the servers.

A request has a new image of noise and ``QUESTION_TOKENS`` tokens of text; its answer has 0.5 to 1.5
times ``answer_tokens``.
"""

import asyncio
import io
import json
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.measured_engine import Result
from benchmarks.serving import running_server
from vitcop_server.bench import check_answered
from vitcop_server.settings import SERVER_KEY
from vitcop_vllm.demo.checkpoint import resolve
from vitcop_vllm.pruning.settings import CONFIG_KEY, RATIO_KEY

QUESTION_TOKENS = 40
IMAGE_SIZE = 336
"""Height and width in pixels."""

HALF_A_GPU = ("--gpu-memory-utilization", "0.45")
"""For each of two servers, if their configuration does not limit GPU memory."""


@dataclass(frozen=True)
class Endpoint:
    """A server.

    Attributes:
        url: Root URL.
        model: The model's name in requests.
        tokenizer: Folder or repository of the tokenizer.
    """

    url: str
    model: str
    tokenizer: str

    def get(self, path: str) -> bytes:
        """The server's answer at a path."""
        with urllib.request.urlopen(self.url + path) as answer:
            content: bytes = answer.read()
        return content

    def kept_tokens(self, ratio: float) -> tuple[int, int]:
        """V, and the plan's visual tokens averaged over layers."""
        query = f"width={IMAGE_SIZE}&height={IMAGE_SIZE}&ratio={ratio:.6f}"
        plan = json.loads(self.get(f"/v1/pruning/plan?{query}"))
        visual = plan["encoder_tokens"]
        return visual, round(visual * (1 - plan["effective_ratio"]))


@dataclass(frozen=True)
class Traffic:
    """A run.

    Attributes:
        requests: Number of requests.
        answer_tokens: Mean length of an answer.
        clients: Limit on concurrent requests.
        rate: Requests a second.
        ratios: Pruning ratios, assigned to the requests in turn; None for stock vLLM.
        text_tokens: Replace the image by so many tokens of text.
    """

    requests: int
    answer_tokens: int
    clients: int | None = None
    rate: float = float("inf")
    ratios: Sequence[float] | None = None
    text_tokens: int | None = None


def sample_requests(tokenizer: Any, traffic: Traffic, seed: int) -> list[Any]:
    """Random requests, made by vLLM."""
    # Also for text: vLLM's text dataset may draw the image placeholder.
    from vllm.benchmarks.datasets import RandomMultiModalDataset

    requests: list[Any] = RandomMultiModalDataset(random_seed=seed).sample(
        tokenizer=tokenizer,
        num_requests=traffic.requests,
        input_len=QUESTION_TOKENS + (traffic.text_tokens or 0),
        output_len=traffic.answer_tokens,
        range_ratio={"input": 0.0, "output": 0.5},
        base_items_per_request=int(traffic.text_tokens is None),
        bucket_config={(IMAGE_SIZE, IMAGE_SIZE, 1): 1.0},
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    if traffic.ratios is not None:
        for request, ratio in zip(requests, cycle(traffic.ratios), strict=False):
            request.request_overrides = {RATIO_KEY: round(ratio, 6)}
    return requests


def serve(server: Endpoint, traffic: Traffic, seed: int, *, may_fail: bool = False) -> Result:
    """Results of vLLM's serving benchmark.

    Args:
        server: The server to measure.
        traffic: The requests, and their arrival.
        seed: Seed of images, text, lengths and arrivals.
        may_fail: Accept failed requests; ``failed`` of the results is their number.

    Raises:
        RequestsFailedError: If a request failed that may not.
    """
    from vllm.benchmarks.serve import TaskType, benchmark
    from vllm.tokenizers import cached_get_tokenizer

    tokenizer = cached_get_tokenizer(server.tokenizer)
    requests = sample_requests(tokenizer, traffic, seed)
    np.random.seed(seed)  # for vLLM's arrivals
    with redirect_stdout(io.StringIO()):  # the bench prints tables and JSON only
        result: Result = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=f"{server.url}/v1/chat/completions",
                base_url=server.url,
                model_id=server.model,
                model_name=server.model,
                tokenizer=tokenizer,
                input_requests=requests,
                logprobs=None,
                request_rate=traffic.rate,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft", "tpot"],
                selected_percentiles=[99.0],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=traffic.clients,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0},
                ready_check_timeout_sec=0,
            )
        )
    if not may_fail:
        check_answered(result)
    return result


NO_IMAGE_CACHE = ("--mm-processor-cache-gb", "0")
"""Ours gets the images of a round once per ratio, and would find them prepared; stock gets them
once. The caches of both servers take more than 10 GB of memory, too."""


@contextmanager
def both_servers(config: Mapping[str, Any]) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Stock vLLM's server and ours, with the same options; see :func:`server_of`."""
    options = {key: value for key, value in config.items() if key not in (CONFIG_KEY, SERVER_KEY)}
    keys = {key.replace("_", "-") for key in config}
    share = () if {"gpu-memory-utilization", "kv-cache-memory-bytes"} & keys else HALF_A_GPU
    flags = (*share, *NO_IMAGE_CACHE)
    with (
        server_of(options, *flags, stock=True) as stock,
        server_of(config, *flags) as ours,
    ):
        yield stock, ours


@contextmanager
def server_of(config: Mapping[str, Any], *flags: str, stock: bool = False) -> Iterator[Endpoint]:
    """A running server.

    Args:
        config: Options of a configuration file.
        *flags: Flags that override ``config``.
        stock: Start stock vLLM's server.
    """
    config = {key.replace("_", "-"): value for key, value in config.items()}
    config["model"] = str(resolve(str(config["model"])))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "server.yaml"
        path.write_text(yaml.safe_dump(config))
        with running_server("--config", str(path), *flags, stock=stock) as (url, _):
            model = config.get("served-model-name", config["model"])
            yield Endpoint(url, model, tokenizer=config["model"])
