"""vLLM's serving benchmark: its requests, and the servers.

A request has an image of noise and ``QUESTION_TOKENS`` tokens of text; its answer has 0.5 to 1.5
times ``answer_tokens``. Runs that are compared have equal lengths and arrivals, but each has images
and text that no cache of a server holds.
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

NO_IMAGE_CACHE = ("--mm-processor-cache-gb", "0")
"""No image comes twice. Prepared ones would fill 4 GiB in each process of both servers."""


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


def sample_requests(tokenizer: Any, traffic: Traffic, seed: int, content: int) -> list[Any]:
    """Random requests, made by vLLM; see :func:`serve`."""
    # Also for text: vLLM's text dataset may draw the image placeholder.
    from vllm.benchmarks.datasets import RandomMultiModalDataset

    requests: list[Any] = RandomMultiModalDataset(random_seed=content).sample(
        tokenizer=tokenizer,
        num_requests=traffic.requests,
        input_len=QUESTION_TOKENS + (traffic.text_tokens or 0),
        base_items_per_request=int(traffic.text_tokens is None),
        bucket_config={(IMAGE_SIZE, IMAGE_SIZE, 1): 1.0},
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    mean = traffic.answer_tokens
    lengths = np.random.default_rng(seed).integers(
        mean - mean // 2, mean + mean // 2 + 1, len(requests)
    )
    ratios = cycle(traffic.ratios or [None])
    for number, (request, length, ratio) in enumerate(zip(requests, lengths, ratios, strict=False)):
        request.expected_output_len = int(length)
        # The demo's vocabulary is too small for texts that all differ.
        request.request_overrides = {"cache_salt": f"{content}-{number}"}
        if ratio is not None:
            request.request_overrides[RATIO_KEY] = round(ratio, 6)
    return requests


def serve(
    server: Endpoint, traffic: Traffic, seed: int, content: int, *, may_fail: bool = False
) -> Result:
    """Results of vLLM's serving benchmark.

    Args:
        server: The server to measure.
        traffic: The requests, and their arrival.
        seed: Seed of the answers' lengths and of arrivals.
        content: Seed of images and text; another one for each run.
        may_fail: Accept failed requests; ``failed`` of the results is their number.

    Raises:
        RequestsFailedError: If a request failed that may not.
    """
    from vllm.benchmarks.serve import TaskType, benchmark
    from vllm.tokenizers import cached_get_tokenizer

    tokenizer = cached_get_tokenizer(server.tokenizer)
    requests = sample_requests(tokenizer, traffic, seed, content)
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


@contextmanager
def both_servers(config: Mapping[str, Any]) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Stock vLLM's server and ours, with the same options; see :func:`server_of`."""
    options = {key: value for key, value in config.items() if key not in (CONFIG_KEY, SERVER_KEY)}
    keys = {key.replace("_", "-") for key in config}
    share = () if {"gpu-memory-utilization", "kv-cache-memory-bytes"} & keys else HALF_A_GPU
    with (
        server_of(options, *share, stock=True) as stock,
        server_of(config, *share) as ours,
    ):
        yield stock, ours


@contextmanager
def server_of(config: Mapping[str, Any], *flags: str, stock: bool = False) -> Iterator[Endpoint]:
    """A running server, without a cache of prepared images.

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
        flags = (*flags, *NO_IMAGE_CACHE)
        with running_server("--config", str(path), *flags, stock=stock) as (url, _):
            model = config.get("served-model-name", config["model"])
            yield Endpoint(url, model, tokenizer=config["model"])
