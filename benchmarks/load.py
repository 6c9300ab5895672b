"""Load over HTTP: vLLM's serving benchmark, sent in turn to stock vLLM's server and to ours.

Either ``clients`` send their next request once the last is answered, or requests arrive as a
Poisson process, at ``rate`` times stock vLLM's throughput with the most clients. ``mixed`` gives
each request one of :data:`MIXED_RATIOS`. ``benchmarks/traffic.py`` makes the requests.

``throughput``, ``ttft_p50`` and ``ttft_p99`` are our figures over stock's in the same round.
``ideal``: the throughput of a server that spends stock's encoder time on an image, and on the rest
of a request stock's time for a text prompt of as many tokens as the plan keeps. If stock takes S
seconds for the images, and T(n) seconds for prompts with n text tokens instead of the image, the
ideal is S / (S - T(V) + T(kept)). Stock's text runs belong to the same round. With arrivals, the
ideal is that of the clients, limited by the arrival of the last request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import count
from statistics import fmean

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.engines import STOCK
from benchmarks.measured_engine import Result
from benchmarks.rounds import Row, Turns, summary
from benchmarks.traffic import Endpoint, Traffic, serve
from vitcop_server.bench import FIGURES

MIXED = "mixed"
MIXED_RATIOS = (7 / 9, 8 / 9, 17 / 18, 17 / 18)
"""All equally frequent; their mean is 8/9."""

RATIOS = ("0", "2/3", "8/9", MIXED)
CLIENTS = (16, 32)
RATES = (0.5, 2.0, 8.0)
REQUESTS_PER_CLIENT = 3

_SPREADS = ("throughput", "ttft_p50", "ttft_p99")


def ratios_of(name: str) -> tuple[float, ...]:
    """The ratios of a run: ``mixed``, or a fraction."""
    return MIXED_RATIOS if name == MIXED else (float(Fraction(name)),)


def measure_load(
    ours: Endpoint,
    stock: Endpoint,
    *,
    rounds: int,
    answer_tokens: int,
    clients: Sequence[int] = CLIENTS,
    rates: Sequence[float] = (),
    ratios: Sequence[str] = RATIOS,
) -> Iterator[Row]:
    """Rows by clients and ratio, then by rate and ratio, each case's when it is measured.

    Args:
        ours: Our server.
        stock: Stock vLLM's server.
        rounds: Number of rounds; figures are medians.
        answer_tokens: Mean length of an answer.
        clients: Numbers of concurrent requests, one case each.
        rates: Poisson arrivals over stock vLLM's throughput, one case each.
        ratios: Pruning ratios of our server.
    """
    turns, seeds, contents = Turns(), count(), count()
    of_clients: dict[int, list[Row]] = {}
    warm_up = Traffic(8, answer_tokens, 4)  # caches, allocators and lazy kernels
    seed = next(seeds)
    serve(ours, replace(warm_up, ratios=ratios_of(ratios[-1])), seed, next(contents))
    serve(stock, warm_up, seed, next(contents))
    for number, rate in (*((n, None) for n in clients), *((max(clients), r) for r in rates)):
        traffic = Traffic(REQUESTS_PER_CLIENT * number, answer_tokens, number)
        conditions: Row = {"clients": number, "requests": traffic.requests}
        ideals: dict[str, float] = {}
        if rate is not None:
            ideals = {row["ratio"]: row["ideal"] for row in of_clients[number]}
            arrivals = rate * of_clients[number][0]["stock_requests_per_second"]
            conditions |= {"rate": rate, "arrivals_per_second": arrivals}
            traffic = Traffic(traffic.requests, answer_tokens, rate=arrivals)
        cases = {name: replace(traffic, ratios=ratios_of(name)) for name in ratios}
        measured: list[dict[str, Row]] = []
        for _ in tqdm(range(rounds), desc=f"load, {number} clients, rate {rate}"):
            seed = next(seeds)
            runs = {
                name: partial(serve, ours, case, seed, next(contents))
                for name, case in cases.items()
            }
            runs[STOCK] = partial(serve, stock, traffic, seed, next(contents))
            results = turns.run(runs)
            base = results[STOCK]
            if rate is None:
                ideals = _ideals(ours, stock, traffic, seed, contents, base["duration"], ratios)
            limit = base["duration"] * traffic.rate / traffic.requests
            measured.append(
                {name: _compared(results[name], base, min(ideals[name], limit)) for name in ratios}
            )
        rows = [
            conditions | {"ratio": name} | summary([row[name] for row in measured], *_SPREADS)
            for name in ratios
        ]
        if rate is None:
            of_clients[number] = rows
        yield from rows


def _ideals(
    ours: Endpoint,
    stock: Endpoint,
    traffic: Traffic,
    seed: int,
    contents: Iterator[int],
    seconds: float,
    ratios: Sequence[str],
) -> dict[str, float]:
    """Ideal throughput over stock's, by ratio; ``seconds`` is stock's time for the images."""
    plans = {name: [ours.kept_tokens(ratio) for ratio in ratios_of(name)] for name in ratios}
    kept = {name: round(fmean(tokens for _, tokens in plan)) for name, plan in plans.items()}
    visual = plans[ratios[0]][0][0]
    text = {
        tokens: serve(stock, replace(traffic, text_tokens=tokens), seed, next(contents))["duration"]
        for tokens in {visual, *kept.values()}
    }
    encoder = max(0.0, seconds - text[visual])
    return {
        name: seconds / (encoder + text[tokens]) if tokens < visual else 1.0
        for name, tokens in kept.items()
    }


def _compared(ours: Result, stock: Result, ideal: float) -> Row:
    throughput = stock["duration"] / ours["duration"]
    return {
        **{f"ours_{name}": ours[field] for name, field in FIGURES.items()},
        **{f"stock_{name}": stock[field] for name, field in FIGURES.items()},
        "throughput": throughput,
        "ideal": ideal,
        "vs_ideal": throughput / ideal,
        "ttft_p50": ours["median_ttft_ms"] / stock["median_ttft_ms"],
        "ttft_p99": ours["p99_ttft_ms"] / stock["p99_ttft_ms"],
    }
