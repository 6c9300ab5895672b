"""An open load of twice what the server carries unpruned, answered in three ways.

First ``clients`` clients send their next request once the last is answered, at ratio 0: the
server's throughput. Then requests arrive as a Poisson process, at :data:`OVERLOAD` times that
throughput: all at ratio 0, all at 8/9, and without a ratio, so that ``server.elastic`` chooses.

``refused``: requests that the server refused, in all rounds, because its queue was full: with 503,
or with an error in a stream that had begun. The queue holds :data:`QUEUE` waiting requests for each
one that runs. ``mean_ratio``: the share of visual tokens
that the server dropped, averaged over its answers and the decoder's layers. Times to first tokens
are those of the answered requests.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, TypeAlias

from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.measured_engine import Result
from benchmarks.rounds import Row, Turns, summary
from benchmarks.traffic import Endpoint, Traffic, serve
from vitcop_server.bench import check_answered
from vitcop_vllm.pruning.plan import STAGES

OVERLOAD = 2.0
REQUESTS_PER_CLIENT = 8
QUEUE = 2

ELASTIC = "elastic"
RATIOS: dict[str, Sequence[float] | None] = {"0": (0.0,), "8/9": (8 / 9,), ELASTIC: None}
"""Ratios of the requests of a case; None: they name none."""

Counters: TypeAlias = Counter[tuple[str, str]]
"""Counters of a server, by name and Stage."""

REFUSED = ("vllm:admission_rejections_total", "")
_TOKENS = "vitcop_visual_tokens_{}_total"


def elastic_options(clients: int) -> dict[str, Any]:
    """Options of a server that runs ``clients`` requests at once; others wait."""
    return {
        "max_num_seqs": clients,
        "max_num_queued_reqs": (1 + QUEUE) * clients,
        "server": {"elastic": {"to": 0.889, "waiting": [clients // 8, clients]}},
    }


def measure_elastic(
    server: Endpoint, *, rounds: int, answer_tokens: int, clients: int
) -> list[Row]:
    """A row for each of :data:`RATIOS`, of medians over rounds.

    Args:
        server: A server with :func:`elastic_options`.
        rounds: Number of rounds.
        answer_tokens: Mean length of an answer.
        clients: Number of requests that the server runs at once.
    """
    turns, seeds, contents = Turns(), count(), count()
    warm_up = Traffic(8, answer_tokens, 4, ratios=(0.0, 8 / 9))
    serve(server, warm_up, next(seeds), next(contents))
    closed = Traffic(3 * clients, answer_tokens, clients, ratios=(0.0,))
    carried = serve(server, closed, next(seeds), next(contents))["request_throughput"]
    arrivals = OVERLOAD * carried
    traffic = Traffic(REQUESTS_PER_CLIENT * clients, answer_tokens, rate=arrivals)
    cases = {name: replace(traffic, ratios=ratios) for name, ratios in RATIOS.items()}
    measured = []
    for _ in tqdm(range(rounds), desc=ELASTIC):
        seed = next(seeds)
        runs = {
            name: partial(_serve, server, case, seed, next(contents))
            for name, case in cases.items()
        }
        measured.append(turns.run(runs))
    conditions = {
        "clients": clients,
        "requests": traffic.requests,
        "unpruned_requests_per_second": carried,
        "arrivals_per_second": arrivals,
    }
    return [
        conditions
        | {"ratio": name}
        | summary(
            [results[name] for results in measured], "mean_ratio", "ttft_p50_ms", "ttft_p99_ms"
        )
        | {"refused": sum(results[name]["refused"] for results in measured)}
        for name in RATIOS
    ]


def _serve(server: Endpoint, traffic: Traffic, seed: int, content: int) -> Result:
    _wait_until_calm(server)
    before = _counters(server)
    result = serve(server, traffic, seed, content, may_fail=True)
    counted = _counters(server) - before
    if result["failed"] != counted[REFUSED]:
        check_answered(result)
    return {
        "refused": result["failed"],
        "mean_ratio": mean_ratio(_config(server), counted),
        "requests_per_second": result["request_throughput"],
        "ttft_p50_ms": result["median_ttft_ms"],
        "ttft_p99_ms": result["p99_ttft_ms"],
    }


def _wait_until_calm(server: Endpoint) -> None:
    """Wait until the default ratio is the operator's: the run before may have raised it."""
    while True:
        config = _config(server)
        if config["default_ratio"] == config["settings"]["default_ratio"]:
            return
        time.sleep(1.0)


def mean_ratio(config: Row, counted: Counters) -> float:
    """The mean ratio of some requests.

    Args:
        config: The answer of ``/v1/pruning/config``.
        counted: What the requests added to the server's counters.
    """
    first = config["first_layers"]
    segments = [*zip(STAGES, first, [*first[1:], config["num_layers"]], strict=True)]
    dropped, kept = (
        sum(counted[_TOKENS.format(fate), stage] * (end - begin) for stage, begin, end in segments)
        for fate in ("dropped", "kept")
    )
    return dropped / (dropped + kept)


def counters_in(metrics: str) -> Counters:
    """Counters in the text of ``/metrics``, summed over their other labels."""
    counters: Counters = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                counters[sample.name, sample.labels.get("stage", "")] += int(sample.value)
    return counters


def _counters(server: Endpoint) -> Counters:
    return counters_in(server.get("/metrics").decode())


def _config(server: Endpoint) -> Row:
    config: Row = json.loads(server.get("/v1/pruning/config"))
    return config
