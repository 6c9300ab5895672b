"""The goals of the bench's figures."""

import operator
from collections.abc import Mapping
from typing import Any

from benchmarks.engines import OURS
from benchmarks.load import MIXED, RATES
from benchmarks.rounds import Row

_PRUNED = ("2/3", "7/9", "8/9")
_GPU = {"device": "gpu", "shape": "llava-1.5-7b"}
_BUSIEST: Row = {"ratio": MIXED, "clients": 32, "rate": (None, max(RATES))}
"""At lower rates, arrivals limit stock vLLM and ours alike."""

# Name, relation, limit, scenario, figure, and conditions on its rows.
GOALS: tuple[tuple[str, str, float, str, str, Row], ...] = (
    ("prefill_vs_ideal", ">=", 1.0, "prefill", "vs_ideal", {"batch": (1, 16), "ratio": _PRUNED}),
    ("stages_share_of_unpruned_prefill", "<=", 0.02, "prefill", "stages_share", {}),
    (
        *("gpu_prefill_speed_up_at_8/9", ">=", 4.5, "prefill", "speed_up"),
        {"ratio": "8/9", "batch": 16, **_GPU},
    ),
    ("prefill_speed_at_0", ">=", 0.98, "prefill", "speed_up", {"ratio": "0"}),
    # Not with vLLM's dummy weights: they are so small that a wrong model gives the same tokens.
    (
        *("same_tokens_at_0", ">=", 1.0, "decode", "same_tokens"),
        {"ratio": "0", "load_format": (None, "random")},
    ),
    ("throughput_at_0", ">=", 0.98, "decode", "throughput", {"ratio": "0"}),
    (
        *("decode_latency_at_8/9", "<=", 1.0, "decode", "decode_latency"),
        {"ratio": "8/9", "running": 32},
    ),
    ("second_turn_ttft", "<=", 1.05, "turns", "ttft", {}),
    ("capacity_vs_ideal_at_8/9", ">=", 0.95, "capacity", "vs_ideal", {"ratio": "8/9"}),
    ("mixed_throughput", ">=", 4.0, "load", "throughput", _BUSIEST),
    ("mixed_ttft_p99", "<", 1.0, "load", "ttft_p99", _BUSIEST),
    ("busy_throughput", ">=", 1.0, "load", "throughput", {"rate": None}),
    ("elastic_refused", "<=", 0.0, "elastic", "refused", {"ratio": "elastic"}),
    ("video_prefill_vs_ideal", ">=", 1.0, "video_prefill", "vs_ideal", {"ratio": _PRUNED}),
    (
        *("same_tokens_of_videos_at_0", ">=", 1.0, "video_decode", "same_tokens"),
        {"ratio": "0", "load_format": (None, "random")},
    ),
    ("second_turn_ttft_of_videos", "<=", 1.05, "video_turns", "ttft", {}),
    ("video_capacity_vs_ideal_at_8/9", ">=", 0.95, "video_capacity", "vs_ideal", {"ratio": "8/9"}),
    ("start_up_seconds_over_stock", "<=", 1.0, "cold_start", "ready_seconds_over_stock", {}),
)

_RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def _holds(row: Row, conditions: Row) -> bool:
    return all(
        row.get(name) in (value if isinstance(value, tuple) else (value,))
        for name, value in conditions.items()
    )


def check_goals(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal's worst figure, and whether it meets the goal, for measured scenarios.

    Args:
        document: Rows by scenario, and ``conditions``.
    """
    met = {}
    for name, relation, limit, scenario, figure, conditions in GOALS:
        figures = [
            float(row[figure])
            for row in document.get(scenario, ())
            if figure in row
            and row.get("selector", OURS) == OURS
            and _holds({**document.get("conditions", {}), **row}, conditions)
        ]
        if figures:
            worst = min(figures) if relation == ">=" else max(figures)
            holds = _RELATIONS[relation](worst, limit)
            met[name] = {"figure": worst, "goal": f"{relation} {limit}", "met": holds}
    return met
