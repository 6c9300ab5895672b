"""Open load: clients who do not wait for one another, as a server meets them."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, cycle, islice
from random import Random
from statistics import median, quantiles
from typing import Any

from vitcop_vllm.lab.engines import Ask, Result
from vitcop_vllm.lab.scenarios import Rounds, summary

CLIENTS = 32
"""Requests in flight; who arrives when there are as many waits outside, on the clock."""

REQUESTS = 128
OVERLOAD = 8.0
"""Arrival rate over the rate at which stock vLLM, never idle, serves the same mix."""

RATIOS = (7 / 9, 8 / 9, 17 / 18, 17 / 18)
"""Equally often each; their mean is 8/9."""

QUESTIONS = (
    "What is this?",
    "How many people are there?",
    "Is it day or night?",
    "What colour is the car on the left?",
    "Read the sign, please.",
    "Where might this have been taken, and why do you think so?",
    "Describe what stands in front of the house.",
    "Is there anything unusual here?",
)


def poisson_arrivals(rate: float, number: int, rng: Random) -> list[float]:
    """Seconds at which ``number`` requests arrive, ascending, ``rate`` a second on average."""
    return list(accumulate(rng.expovariate(rate) for _ in range(number)))


def mixed_ratios(number: int, rng: Random) -> list[float]:
    """:data:`RATIOS` in random order; every fourth number of them has exactly their mean."""
    ratios = list(islice(cycle(RATIOS), number))
    rng.shuffle(ratios)
    return ratios


def mixed_asks(pictures: Sequence[int], arrivals: Sequence[float], rng: Random) -> list[Ask]:
    """A request about each picture: some question, and an answer of 4 to 32 tokens."""
    ratios = mixed_ratios(len(pictures), rng)
    return [
        Ask(
            f"USER: <image>\n{rng.choice(QUESTIONS)} ASSISTANT:",
            picture,
            ratio,
            max_tokens=rng.randint(4, 32),
            arrival=arrival,
        )
        for picture, ratio, arrival in zip(pictures, ratios, arrivals, strict=True)
    ]


def _seconds_to_first_token(result: Result) -> tuple[float, float]:
    """Median and 99th percentile."""
    seconds = result["first_token_seconds"]
    return median(seconds), quantiles(seconds, n=100, method="inclusive")[-1]


def measure_load(rounds: Rounds) -> dict[str, Any]:
    """Requests a second and time to first token at a rate that stock vLLM cannot serve."""
    at_once = mixed_asks(rounds.pictures(REQUESTS), [0.0] * REQUESTS, Random(0))
    saturated, _ = rounds.serve(at_once, CLIENTS)
    rate = OVERLOAD * REQUESTS / saturated["seconds"]
    figures: dict[str, list[float]] = defaultdict(list)
    for number in rounds:
        rng = Random(1 + number)
        arrivals = poisson_arrivals(rate, REQUESTS, rng)
        asks = mixed_asks(rounds.pictures(REQUESTS), arrivals, rng)
        stock, ours = rounds.serve(asks, CLIENTS)
        for name, result in (("stock", stock), ("ours", ours)):
            figures[f"{name}_requests_per_second"].append(REQUESTS / result["seconds"])
            p50, p99 = _seconds_to_first_token(result)
            figures[f"{name}_ttft_p50_ms"].append(p50 * 1e3)
            figures[f"{name}_ttft_p99_ms"].append(p99 * 1e3)
        figures["throughput"].append(stock["seconds"] / ours["seconds"])
        for name in ("ttft_p50", "ttft_p99"):
            ratio = figures[f"ours_{name}_ms"][-1] / figures[f"stock_{name}_ms"][-1]
            figures[name].append(ratio)
    fixed = {"requests": REQUESTS, "clients": CLIENTS, "arrivals_per_second": rate}
    return summary(figures, ["throughput", "ttft_p50", "ttft_p99"]) | fixed
