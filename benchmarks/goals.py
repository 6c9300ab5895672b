"""What the bench's figures are held against."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engines import OURS
from benchmarks.load import MIXED, RATES
from benchmarks.rounds import Row

GOALS = {
    "prefill_vs_ideal": (">=", 1.0),
    "stages_share_of_unpruned_prefill": ("<=", 0.02),
    "gpu_prefill_speed_up_at_8/9": (">=", 4.5),
    "prefill_speed_at_0": (">=", 0.98),
    "same_tokens_at_0": (">=", 1.0),
    "throughput_at_0": (">=", 0.98),
    "decode_latency_at_8/9": ("<=", 1.0),
    "second_turn_ttft": ("<=", 1.05),
    "capacity_vs_ideal_at_8/9": (">=", 0.95),
    "mixed_throughput": (">=", 4.0),
    "mixed_ttft_p99": ("<", 1.0),
    "busy_throughput": (">=", 1.0),
    "start_up_seconds_over_stock": ("<=", 1.0),
}
"""Relation and limit of each figure; :func:`worst_figures` says what they are taken of."""

BATCHES = (1, 16)
"""Requests at once whose prefill is held to its ideal."""

RUNNING = 32
"""Requests that decode, or clients."""

_RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def worst_figures(document: Mapping[str, Any]) -> dict[str, float]:
    """What each goal is held against, of the scenarios and conditions that were run.

    Args:
        document: Rows by scenario, and ``conditions``.
    """
    figures: dict[str, float] = {}

    def rows(scenario: str, **conditions: object) -> list[Row]:
        return [
            row
            for row in document.get(scenario, ())
            if row.get("selector", OURS) == OURS
            and all(row[name] == value for name, value in conditions.items())
        ]

    def least(goal: str, figure: str, chosen: Sequence[Row]) -> None:
        if chosen:
            figures[goal] = float(min(row[figure] for row in chosen))

    def most(goal: str, figure: str, chosen: Sequence[Row]) -> None:
        if chosen:
            figures[goal] = float(max(row[figure] for row in chosen))

    prefill = rows("prefill")
    held = [row for row in prefill if row["batch"] in BATCHES and row["ratio"] != "0"]
    least("prefill_vs_ideal", "vs_ideal", held)
    least("prefill_speed_at_0", "speed_up", rows("prefill", ratio="0"))
    most("stages_share_of_unpruned_prefill", "stages_share", prefill)
    conditions = document.get("conditions", {})
    if (conditions.get("device"), conditions.get("shape")) == ("gpu", "llava-1.5-7b"):
        fastest = rows("prefill", ratio="8/9", batch=16)
        least("gpu_prefill_speed_up_at_8/9", "speed_up", fastest)
    if conditions.get("load_format") != "dummy":
        # vLLM's dummy weights are so small that a model repeats what it reads, right or wrong.
        least("same_tokens_at_0", "same_tokens", rows("decode", ratio="0"))
    least("throughput_at_0", "throughput", rows("decode", ratio="0"))
    most("decode_latency_at_8/9", "decode_latency", rows("decode", ratio="8/9", running=RUNNING))
    most("second_turn_ttft", "ttft", rows("turns"))
    least("capacity_vs_ideal_at_8/9", "vs_ideal", rows("capacity", ratio="8/9"))
    # Under less than the greatest rate, arrivals are what limits both.
    mixed = rows("clients", ratio=MIXED, clients=RUNNING) + rows("load", rate=max(RATES))
    least("mixed_throughput", "throughput", mixed)
    most("mixed_ttft_p99", "ttft_p99", mixed)
    least("busy_throughput", "throughput", rows("clients"))
    most("start_up_seconds_over_stock", "ready_seconds_over_stock", rows("cold_start"))
    return figures


def goals_met(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal's worst figure and whether it holds, for the scenarios that were run."""
    figures = worst_figures(document)
    met = {}
    for name, (relation, goal) in GOALS.items():
        if name in figures:
            holds = _RELATIONS[relation](figures[name], goal)
            met[name] = {"figure": figures[name], "goal": f"{relation} {goal}", "met": holds}
    return met
