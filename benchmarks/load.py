"""Clients as a server meets them: who come when they like, and who wait for their answers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, cycle, islice
from math import exp, log
from random import Random
from statistics import median, quantiles

from benchmarks.asks import Ask, text_of, user_turn
from benchmarks.engines import OURS, STOCK
from benchmarks.ideals import StockCosts
from benchmarks.measured_engine import Result
from benchmarks.rounds import LONG_ROUNDS, Rounds, Row, summary

CLIENTS = (16, 32)
"""Requests in flight."""

REQUESTS = 96
"""Of a run under open load; whoever arrives when the most clients are in waits outside, on the
clock."""

REQUESTS_PER_CLIENT = 3
"""Of a run in which clients wait for their answers."""

RATES = (0.5, 2.0, 8.0)
"""Arrivals, over the rate at which stock vLLM, never idle, serves the same mix. Between the
last two is what ours can serve."""

MIXED = "mixed"
MIXED_RATIOS = (7 / 9, 8 / 9, 17 / 18, 17 / 18)
"""Equally often each; their mean is 8/9."""

RATIOS = ("0", "2/3", "8/9", MIXED)

QUESTION_TOKENS = 32
"""Median of a question."""

_SPREAD = 0.8
"""Standard deviation of a length's logarithm: chats have many short turns, a few long ones."""

_COST_TOKENS = 9


def poisson_arrivals(rate: float, number: int, rng: Random) -> list[float]:
    """Seconds at which ``number`` requests arrive, ascending.

    A Poisson process whose last arrival is where ``rate`` a second has it, as vLLM's own
    serving benchmark draws them: of some hundred requests the last would otherwise come a
    fifth sooner or later than the rate says.
    """
    arrivals = list(accumulate(rng.expovariate(rate) for _ in range(number)))
    stretch = number / rate / arrivals[-1]
    return [stretch * arrival for arrival in arrivals]


def mixed_ratios(number: int, rng: Random) -> list[float]:
    """:data:`MIXED_RATIOS` in random order; every fourth number has exactly their mean."""
    ratios = list(islice(cycle(MIXED_RATIOS), number))
    rng.shuffle(ratios)
    return ratios


def chat_length(median_tokens: int, rng: Random) -> int:
    """Tokens of a turn: log-normal, between a quarter of the median and four times as many."""
    tokens = round(exp(rng.gauss(log(median_tokens), _SPREAD)))
    return min(max(tokens, median_tokens // 4, 1), 4 * median_tokens)


def chat_asks(
    images: Sequence[int], arrivals: Sequence[float], answer_tokens: int, rng: Random
) -> list[Ask]:
    """A request about each image, at :func:`mixed_ratios`, as long as those of chats.

    Args:
        images: Seeds.
        arrivals: Seconds after the clock starts.
        answer_tokens: Median length of an answer.
    """
    ratios = mixed_ratios(len(images), rng)
    return [
        Ask(
            user_turn(text_of(chat_length(QUESTION_TOKENS, rng), rng)),
            (image,),
            ratio,
            max_tokens=chat_length(answer_tokens, rng),
            arrival=arrival,
        )
        for image, ratio, arrival in zip(images, ratios, arrivals, strict=True)
    ]


def stock_costs(rounds: Rounds, clients: int) -> StockCosts:
    """What ``clients`` requests at once cost stock vLLM, part by part."""
    timed, watched = rounds.serve_watched(
        partial(rounds.asks, clients, 0.0, _COST_TOKENS), names=(STOCK,)
    )
    stock, encoder = timed[STOCK], watched[STOCK]["encoder_seconds"]
    prompts = stock["prompt_tokens"]
    return StockCosts(
        encoder=encoder / clients,
        token=(max(stock["first_token_seconds"]) - encoder) / sum(prompts),
        step=median(stock["decode_step_seconds"]),
        text_step=rounds.decode_step_seconds(
            clients, prompts[0] - rounds.shape.visual_tokens, _COST_TOKENS
        ),
    )


def _ideal(
    costs: StockCosts, rounds: Rounds, asks: Sequence[Ask], stock: Result, last_arrival: float = 0.0
) -> float:
    """Rate over stock vLLM's of an ideal engine, which cannot finish before all have come."""
    seconds = stock["seconds"]
    ideal = costs.ideal_serving(
        rounds.shape, asks, stock["prompt_tokens"], seconds, sum(stock["decode_step_seconds"])
    )
    return float(seconds / max(ideal, last_arrival))


def _take(
    figures: dict[str, list[float]], stock: Result, ours: Result, ideal: float, since: str
) -> None:
    """Add a round's figures; ``since`` names the result's seconds to first tokens."""
    for side, result in (("stock", stock), ("ours", ours)):
        seconds = result[since]
        figures[f"{side}_requests_per_second"].append(len(seconds) / result["seconds"])
        figures[f"{side}_ttft_p50_ms"].append(median(seconds) * 1e3)
        p99 = quantiles(seconds, n=100, method="inclusive")[-1]
        figures[f"{side}_ttft_p99_ms"].append(p99 * 1e3)
    throughput = stock["seconds"] / ours["seconds"]
    figures["throughput"].append(throughput)
    figures["ideal"].append(ideal)
    figures["vs_ideal"].append(throughput / ideal)
    for name in ("ttft_p50", "ttft_p99"):
        figures[name].append(figures[f"ours_{name}_ms"][-1] / figures[f"stock_{name}_ms"][-1])


def _row(conditions: Mapping[str, object], figures: Mapping[str, list[float]]) -> Row:
    return {**conditions} | summary(figures, ["throughput", "ttft_p50", "ttft_p99"])


def measure_load(rounds: Rounds, rates: Sequence[float], answer_tokens: int) -> list[Row]:
    """Requests that arrive whether or not there is room for them, at mixed ratios.

    Ideal is stock vLLM's own time, scaled by what plans keep, where arrivals let it.

    Args:
        rates: Arrivals, over the rate that stock vLLM serves; see :data:`RATES`.
        answer_tokens: Median length of an answer.
    """
    clients = max(CLIENTS)
    names = (STOCK, OURS)
    costs = stock_costs(rounds, clients)
    at_once = _busy_asks(rounds, REQUESTS, answer_tokens, seed=0)
    busy = rounds.serve(at_once, clients=clients, names=names)[STOCK]["seconds"]
    rows = []
    for rate in rates:
        arriving = rate * REQUESTS / busy
        figures: dict[str, list[float]] = defaultdict(list)
        for number in rounds.at_most(LONG_ROUNDS):
            rng = Random(1 + number)
            arrivals = poisson_arrivals(arriving, REQUESTS, rng)
            asks = chat_asks(rounds.images(REQUESTS), arrivals, answer_tokens, rng)
            served = rounds.serve(asks, clients=clients, names=names)
            ideal = _ideal(costs, rounds, asks, served[STOCK], arrivals[-1])
            _take(figures, served[STOCK], served[OURS], ideal, "first_token_seconds")
        conditions = {
            "rate": rate,
            "arrivals_per_second": arriving,
            "ratio": MIXED,
            "clients": clients,
            "requests": REQUESTS,
        }
        rows.append(_row(conditions, figures))
    return rows


def _busy_asks(rounds: Rounds, number: int, answer_tokens: int, seed: int) -> list[Ask]:
    """Requests that are all there from the start; the same ones about other images each time."""
    return chat_asks(rounds.images(number), [0.0] * number, answer_tokens, Random(seed))


def measure_clients(rounds: Rounds, clients: int, answer_tokens: int) -> list[Row]:
    """Clients who each send their next request once the last is answered.

    Stock vLLM runs once in a round, ours once for each ratio, at the same questions.

    Args:
        clients: How many there are.
        answer_tokens: Median length of an answer.
    """
    costs = stock_costs(rounds, clients)
    names = (STOCK, *RATIOS)
    requests = clients * REQUESTS_PER_CLIENT
    figures: dict[str, dict[str, list[float]]] = {ratio: defaultdict(list) for ratio in RATIOS}
    for number in rounds.at_most(LONG_ROUNDS):
        sent = {name: _busy_asks(rounds, requests, answer_tokens, number) for name in names}
        for ratio in set(RATIOS) - {MIXED}:
            sent[ratio] = [replace(ask, ratio=float(Fraction(ratio))) for ask in sent[ratio]]
        served = rounds.in_turn(
            {
                name: partial(
                    rounds.engines[STOCK if name == STOCK else OURS].run,
                    "images",
                    asks=asks,
                    clients=clients,
                )
                for name, asks in sent.items()
            }
        )
        stock = served[STOCK]
        for ratio, row in figures.items():
            ideal = _ideal(costs, rounds, sent[ratio], stock)
            _take(row, stock, served[ratio], ideal, "first_token_seconds_once_sent")
    return [
        _row({"clients": clients, "ratio": ratio, "requests": requests}, row)
        for ratio, row in figures.items()
    ]
