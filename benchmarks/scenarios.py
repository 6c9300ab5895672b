"""What the bench has engines do beyond prefill: decode, second turns, and a full KV cache."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import ceil
from statistics import median

from benchmarks.asks import Ask
from benchmarks.engines import OURS, PEER, STOCK, EngineName, EngineProcess
from benchmarks.ideals import ImagePlan, ideal_capacity, ideal_prefill, kv_budget
from benchmarks.measured_engine import Result
from benchmarks.rounds import Rounds, Row, summary
from vitcop_vllm.pruning.settings import SelectorName

DECODE_RATIOS = ("0", "8/9")
TURN_RATIOS = ("2/3", "8/9")
CAPACITY_RATIOS = ("0", "8/9")

NEXT_QUESTION = "And what is it made of?"
ANSWER_TOKENS = 16
"""Of a first turn, and of the requests that are to share a KV cache."""


def measure_decode(rounds: Rounds, ratio: str, running: int, tokens: int) -> list[Row]:
    """Latency of a decode step, and of the whole, over stock vLLM's.

    Ideal is a prefill that costs its tokens, and stock vLLM's own decode step after text
    prompts as long as what the plan keeps, averaged over layers.
    """
    value = float(Fraction(ratio))
    plans = {name: ImagePlan.of(rounds.shape, value, name) for name in rounds.selectors}
    figures: dict[SelectorName, dict[str, list[float]]] = {
        name: defaultdict(list) for name in plans
    }
    for _ in rounds:
        timed, watched = rounds.serve_watched(partial(rounds.asks, running, value, tokens))
        stock = timed[STOCK]
        encoder, prefill = watched[STOCK]["encoder_seconds"], max(stock["first_token_seconds"])
        text = stock["prompt_tokens"][0] - rounds.shape.visual_tokens
        step = median(stock["decode_step_seconds"])
        ideal_steps = {rounds.shape.visual_tokens: step}
        for name, plan in plans.items():
            kept = round(plan.average)
            if kept not in ideal_steps:
                ideal_steps[kept] = rounds.decode_step_seconds(running, text + kept, tokens)
            ideal_step = ideal_steps[kept] / step
            seconds = timed[name]["seconds"]
            ideal = ideal_prefill(prefill, encoder, plan.share(text))
            ideal += (stock["seconds"] - prefill) * ideal_step
            for figure, measured in {
                "stock_decode_step_ms": step * 1e3,
                "decode_latency": median(timed[name]["decode_step_seconds"]) / step,
                "ideal_decode_latency": ideal_step,
                "throughput": stock["seconds"] / seconds,
                "ideal": stock["seconds"] / ideal,
                "vs_ideal": ideal / seconds,
                "same_tokens": float(timed[name]["tokens"] == stock["tokens"]),
            }.items():
                figures[name][figure].append(measured)
        if PEER in plans:
            figures[OURS]["vs_peer"].append(timed[PEER]["seconds"] / timed[OURS]["seconds"])
    conditions = {"ratio": ratio, "running": running, "answer_tokens": tokens}
    return [
        conditions
        | {"selector": name}
        | summary(row, ["decode_latency", "throughput"])
        # In every round, or it does not count.
        | {"same_tokens": bool(min(row["same_tokens"]))}
        for name, row in figures.items()
    ]


def second_turn(engine: EngineProcess, ask: Ask) -> Result:
    """Serve ``ask``, then the next question about the same image, of which the result is."""
    (answer,) = engine.run("images", asks=[ask])["answers"]
    prompt = f"{ask.prompt}{answer} USER: {NEXT_QUESTION} ASSISTANT:"
    return engine.run("images", asks=[replace(ask, prompt=prompt, max_tokens=1, letters=False)])


def measure_turns(rounds: Rounds, ratio: str) -> list[Row]:
    """Time to first token of a second turn, and prompt tokens that it reuses.

    Ideal is stock vLLM's own time: the image is cached, and the same text is left.
    """
    value = float(Fraction(ratio))

    def converse() -> dict[EngineName, Result]:
        (first,) = rounds.asks(1, value, ANSWER_TOKENS)
        ask = replace(first, letters=True)
        return rounds.in_turn(
            {name: partial(second_turn, rounds.engines[name], ask) for name in (STOCK, OURS)}
        )

    converse()  # kernels that are lazy about prompts half of which is cached
    figures: dict[str, list[float]] = defaultdict(list)
    for _ in rounds:
        for name, result in converse().items():
            side = "stock" if name == STOCK else "ours"
            figures[f"{side}_ttft_ms"].append(result["first_token_seconds"][0] * 1e3)
            figures[f"{side}_prompt_tokens"].append(result["prompt_tokens"][0])
            figures[f"{side}_reused_tokens"].append(result["reused_tokens"][0])
        figures["ttft"].append(figures["ours_ttft_ms"][-1] / figures["stock_ttft_ms"][-1])
    return [{"ratio": ratio} | summary(figures, ["ttft"]) | {"ideal": 1.0}]


def measure_capacity(rounds: Rounds, ratio: str) -> list[Row]:
    """The most requests that run at once, unpreempted, in KV memory of the same size."""
    value, shape = float(Fraction(ratio)), rounds.shape
    visual, layers = shape.visual_tokens, shape.layers
    probe = rounds.engines[STOCK].run("images", asks=rounds.asks(1, value, 1))
    # An answer's last token is not given back to the decoder.
    text = probe["prompt_tokens"][0] - visual + ANSWER_TOKENS - 1
    budget = kv_budget(text + visual, layers)
    averages = {STOCK: float(visual)} | {
        name: ImagePlan.of(shape, value, name).average for name in rounds.selectors
    }
    ideals = {
        name: ideal_capacity(budget, text + average, layers) for name, average in averages.items()
    }

    def serve(name: EngineName) -> Callable[[], Result]:
        def run() -> Result:
            asks = rounds.asks(ceil(1.25 * ideals[name]), value, ANSWER_TOKENS)
            return rounds.engines[name].run("capacity", asks=asks, budget=budget)

        return run

    figures: dict[EngineName, dict[str, list[float]]] = {
        name: defaultdict(list) for name in rounds.selectors
    }
    for _ in rounds:
        results = rounds.in_turn({name: serve(name) for name in rounds.engines})
        stock, ours = results[STOCK], results[OURS]
        for name, row in figures.items():
            row["stock_most"].append(stock["most"])
            row["stock_vs_ideal"].append(stock["most"] / ideals[STOCK])
            row["most"].append(results[name]["most"])
            row["vs_ideal"].append(results[name]["most"] / ideals[name])
            row["preemptions"].append(results[name]["preemptions"])
        if PEER in results:
            figures[OURS]["vs_peer"].append(ours["most"] / results[PEER]["most"])
    return [
        {"ratio": ratio, "selector": name, "budget": budget}
        | {"stock_ideal": ideals[STOCK], "ideal": ideals[name]}
        | summary(row, ["vs_ideal"])
        for name, row in figures.items()
    ]
