"""Prefill: requests that arrive at once and get one token, with short and long prompts."""

from collections import defaultdict
from fractions import Fraction

from vitcop_vllm.lab.asks import QUESTION, text_of
from vitcop_vllm.lab.engines import OURS, PEER, STOCK
from vitcop_vllm.lab.ideals import PicturePlan, ideal_prefill
from vitcop_vllm.lab.rounds import Rounds, Row, summary
from vitcop_vllm.pruning.settings import SelectorName

RATIOS = ("2/3", "7/9", "8/9")
LONG_RATIOS = ("2/3", "8/9")
"""Of prompts with many pictures, or with much text."""

PICTURES = (1, 4, 8)
"""In one prompt."""

TEXT_TOKENS = (1024, 2048)
"""Beside one picture."""


def measure_prefill(
    rounds: Rounds, ratio: str, batch: int, *, pictures: int = 1, question: str = QUESTION
) -> list[Row]:
    """Prefill of ``batch`` requests at once, one row for each engine that prunes.

    Ideal times are taken within the round: the machine may be another one in the next.
    """
    shape, value = rounds.shape, float(Fraction(ratio))
    plans = {name: PicturePlan.of(shape, value, name) for name in rounds.selectors}
    figures: dict[SelectorName, dict[str, list[float]]] = {
        name: defaultdict(list) for name in plans
    }
    text = 0
    for _ in rounds:
        timed, watched = rounds.serve_watched(
            lambda: rounds.asks(batch, value, 1, pictures=pictures, question=question)
        )
        stock, encoder = timed[STOCK]["seconds"], watched[STOCK]["encoder_seconds"]
        text = timed[STOCK]["prompt_tokens"][0] - pictures * shape.visual_tokens
        rows = {
            tokens: rounds.layer_seconds(batch, text + pictures * tokens)
            for tokens in {tokens for plan in plans.values() for tokens in plan.counts.stages}
        }
        for name, plan in plans.items():
            seconds = timed[name]["seconds"]
            ideal = ideal_prefill(stock, encoder, plan.share(text, pictures))
            kernels = encoder + sum(
                layers * rows[tokens]
                for layers, tokens in zip(plan.layers, plan.counts.stages, strict=True)
            )
            for figure, measured in {
                "stock_ms": stock * 1e3,
                "pruned_ms": seconds * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "speed_up": stock / seconds,
                "ideal": stock / ideal,
                "vs_ideal": ideal / seconds,
                "vs_stock_rows": kernels / seconds,
                "stages_share": watched[name]["stage_seconds"] / stock,
            }.items():
                figures[name][figure].append(measured)
        if PEER in plans:
            # Of the same layer average: what is left over is what choosing late costs.
            figures[OURS]["vs_peer"].append(timed[PEER]["seconds"] / timed[OURS]["seconds"])
    conditions = {"ratio": ratio, "batch": batch, "pictures": pictures, "text_tokens": text}
    return [
        conditions
        | {"selector": name, "visual_tokens": list(plans[name].counts.stages)}
        | summary(row, [figure for figure in ("speed_up", "vs_ideal", "vs_peer") if figure in row])
        for name, row in figures.items()
    ]


def measure_images(rounds: Rounds, ratio: str, pictures: int) -> list[Row]:
    """Prefill of one request about several pictures."""
    rounds.serve(rounds.asks(1, float(Fraction(ratio)), 1, pictures=pictures))  # lazy kernels
    return measure_prefill(rounds, ratio, 1, pictures=pictures)


def measure_long_text(rounds: Rounds, ratio: str, tokens: int) -> list[Row]:
    """Prefill of one request about a picture, with some ``tokens`` tokens of text."""
    question = text_of(tokens)
    rounds.serve(rounds.asks(1, float(Fraction(ratio)), 1, question=question))  # lazy kernels
    return measure_prefill(rounds, ratio, 1, question=question)
