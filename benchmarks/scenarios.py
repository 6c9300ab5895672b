"""Scenarios beyond prefill: decode, second turns, and a full KV cache.

Decode: ``decode_latency`` is our median decode step over stock vLLM's; ``throughput`` is stock's
total time over ours. The ideal is an ideal prefill (see ideals.py), then stock's decode steps after
text prompts of as many tokens as the plan keeps, averaged over layers.

Turns: ``ttft`` is our time to the first token of a second question about an image, over stock's.
The ideal is stock's time: the image is cached, and both compute the same text.

Capacity: the most requests that run at once without preemption, in KV memory of the same size. The
ideal is not rounded to blocks or to whole requests.

``vs_evs``: our speed, or number of requests, over that of stock vLLM which prunes videos to as many
tokens.
"""

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import ceil
from statistics import median

from benchmarks.engines import EVS, EVS_RATIO, OURS, STOCK, EngineName
from benchmarks.ideals import ideal_capacity, ideal_prefill, kv_budget
from benchmarks.measured_engine import Result
from benchmarks.requests import ImageRequest
from benchmarks.rounds import Rounds, Row, over_ours, summary

DECODE_RATIOS = ("0", "8/9")
TURN_RATIOS = ("2/3", "8/9")
CAPACITY_RATIOS = ("0", "8/9")

NEXT_QUESTION = "And what is it made of?"
ANSWER_TOKENS = 16
"""Answer length of first turns, and of the requests in scenario capacity."""


def measure_decode(rounds: Rounds, ratio: str, running: int, tokens: int) -> list[Row]:
    """Decode ``running`` concurrent answers of ``tokens`` tokens each."""
    value, images = float(Fraction(ratio)), rounds.images
    plans = rounds.plans(value)
    measured: dict[EngineName, list[dict[str, float]]] = defaultdict(list)
    requests = partial(rounds.new_requests, running, value, tokens)
    engines = rounds.engines_at(ratio)
    rounds.serve(requests(), *engines)  # caches, allocators and lazy kernels
    for _ in range(rounds.number):
        timed, profiled = rounds.serve_profiled(requests, *engines)
        stock = timed[STOCK]
        encoder, prefill = profiled[STOCK]["encoder_seconds"], max(stock["first_token_seconds"])
        text = stock["prompt_tokens"][0] - rounds.visual_tokens
        step = median(stock["decode_step_seconds"])
        ideal_steps = {rounds.visual_tokens: step}
        for name in (name for name in engines if name != STOCK):
            run = timed[name]
            figures = {
                "stock_decode_step_ms": step * 1e3,
                "decode_latency": median(run["decode_step_seconds"]) / step,
                "throughput": stock["seconds"] / run["seconds"],
            }
            if name in plans:
                kept = round(images * plans[name].average)
                if kept not in ideal_steps:
                    ideal_steps[kept] = rounds.decode_step_seconds(running, text + kept, tokens)
                ideal_step = ideal_steps[kept] / step
                ideal = ideal_prefill(prefill, encoder, plans[name].share(text, images))
                ideal += (stock["seconds"] - prefill) * ideal_step
                figures |= {
                    "ideal_decode_latency": ideal_step,
                    "ideal": stock["seconds"] / ideal,
                    "vs_ideal": ideal / run["seconds"],
                    "same_tokens": float(run["tokens"] == stock["tokens"]),
                }
            measured[name].append(figures)
        measured[OURS][-1] |= over_ours({name: run["seconds"] for name, run in timed.items()})
    conditions = {"ratio": ratio, "running": running, "answer_tokens": tokens}
    return [
        conditions
        | {"selector": name}
        | summary(rows, "decode_latency", "throughput", "vs_evs")
        | ({"same_tokens": all(row["same_tokens"] for row in rows)} if name in plans else {})
        for name, rows in measured.items()
    ]


def second_turn(rounds: Rounds, request: ImageRequest, name: EngineName) -> Result:
    """The result of a second question about the image of ``request``."""
    engine = rounds.engines[name]
    (answer,) = engine.run("images", requests=[request])["answers"]
    prompt = f"{request.prompt}{answer} USER: {NEXT_QUESTION} ASSISTANT:"
    return engine.run(
        "images", requests=[replace(request, prompt=prompt, max_tokens=1, letters=False)]
    )


def measure_turns(rounds: Rounds, ratio: str) -> list[Row]:
    """Time to the first token of a second turn, and the prompt tokens that it reuses."""
    measured = []
    for number in range(rounds.number + 1):
        (first,) = rounds.new_requests(1, float(Fraction(ratio)), ANSWER_TOKENS)
        request = replace(first, letters=True)
        sides: dict[str, EngineName] = {"stock": STOCK, "ours": OURS}
        if EVS in rounds.engines_at(ratio):
            sides["evs"] = EVS
        results = rounds.in_turn(partial(second_turn, rounds, request), *sides.values())
        figures: dict[str, float] = {}
        for side, name in sides.items():
            figures[f"{side}_ttft_ms"] = results[name]["first_token_seconds"][0] * 1e3
            figures[f"{side}_prompt_tokens"] = results[name]["prompt_tokens"][0]
            figures[f"{side}_reused_tokens"] = results[name]["reused_tokens"][0]
        figures["ttft"] = figures["ours_ttft_ms"] / figures["stock_ttft_ms"]
        if number:  # round 0 warms up kernels for partly cached prompts
            measured.append(figures)
    return [{"ratio": ratio} | summary(measured, "ttft") | {"ideal": 1.0}]


def measure_capacity(rounds: Rounds, ratio: str) -> list[Row]:
    """The most requests that run at once, in the KV memory of eight unpruned requests."""
    value, visual = float(Fraction(ratio)), rounds.visual_tokens
    layers, engines = rounds.shape.layers, rounds.engines_at(ratio)
    requests = rounds.new_requests(1, value, 1)
    # An answer's last token needs no KV slot.
    length = rounds.serve(requests, STOCK)[STOCK]["prompt_tokens"][0] + ANSWER_TOKENS - 1
    text = length - visual
    budget = kv_budget(length, layers)
    averages: dict[EngineName, float] = {STOCK: float(visual)}
    averages |= {name: rounds.images * plan.average for name, plan in rounds.plans(value).items()}
    if EVS in engines:
        averages[EVS] = (1 - float(Fraction(EVS_RATIO))) * visual
    ideals = {
        name: ideal_capacity(budget, text + average, layers) for name, average in averages.items()
    }

    def serve(name: EngineName) -> Result:
        requests = rounds.new_requests(ceil(1.25 * ideals[name]), value, ANSWER_TOKENS)
        return rounds.engines[name].run("capacity", requests=requests, budget=budget)

    measured: dict[EngineName, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds.number):
        results = rounds.in_turn(serve, *engines)
        most = {name: results[name]["max_running"] for name in ideals}
        for name in (name for name in ideals if name != STOCK):
            figures = {
                "stock_most": most[STOCK],
                "stock_vs_ideal": most[STOCK] / ideals[STOCK],
                "most": most[name],
                "vs_ideal": most[name] / ideals[name],
                "preemptions": results[name]["preemptions"],
            }
            measured[name].append(figures)
        measured[OURS][-1] |= over_ours({name: 1 / number for name, number in most.items()})
    return [
        {"ratio": ratio, "selector": name, "budget": budget}
        | {"stock_ideal": ideals[STOCK], "ideal": ideals[name]}
        | summary(rows, "vs_ideal")
        for name, rows in measured.items()
    ]
