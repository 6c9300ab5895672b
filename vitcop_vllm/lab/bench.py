"""``python -m vitcop_vllm.lab.bench``: what pruning saves, beside what it should save.

Stock vLLM and ours run the same pictures with the same random weights, in alternating
rounds; figures are medians over rounds. The *ideal* speed-up counts tokens: the encoder
costs both what it was measured to cost stock, the decoder costs each layer its tokens.
*vs-rows* compares with what stock vLLM itself takes for text prompts of as many rows per
layer: a kernel that is slow for few rows is slow for both. KV memory has an ideal too: no
blocks, and no whole requests. Prefix caching is on, as is vLLM's default; only a second turn
asks about a picture that was seen before.
"""

import argparse
import json
import operator
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from vitcop_vllm.demo.checkpoint import DEMO, LLAVA_1_5_7B, SMALL, save_random_llava
from vitcop_vllm.lab.engines import two_engines
from vitcop_vllm.lab.load import measure_load
from vitcop_vllm.lab.scenarios import (
    CAPACITY_RATIOS,
    DECODE_RATIOS,
    PREFILL_RATIOS,
    TURN_RATIOS,
    Rounds,
    measure_capacity,
    measure_decode,
    measure_prefill,
    measure_turns,
)

SHAPES = {"demo": DEMO, "small": SMALL, "llava-1.5-7b": LLAVA_1_5_7B}
SCENARIOS = ("prefill", "decode", "turns", "capacity", "load")
MAX_NUM_SEQS = 64
"""More than any scenario lets run at once, unless a batch is larger."""

GOALS = {
    "prefill_vs_ideal": (">=", 1.0),
    "throughput_at_0": (">=", 0.98),
    "decode_latency_at_8/9": ("<=", 1.02),
    "stages_share_of_unpruned_prefill": ("<=", 0.02),
    "second_turn_ttft": ("<=", 1.05),
    "capacity_vs_ideal_at_8/9": (">=", 0.95),
    "load_throughput": (">=", 3.0),
    "load_ttft_p50": ("<", 1.0),
    "load_ttft_p99": ("<", 1.0),
}
_RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def worst_figures(document: dict[str, Any]) -> dict[str, float]:
    """What each goal is held against, of the scenarios that were run."""
    figures: dict[str, float] = {}
    if prefill := document.get("prefill"):
        figures["prefill_vs_ideal"] = min(row["vs_ideal"] for row in prefill)
        figures["stages_share_of_unpruned_prefill"] = max(row["stages_share"] for row in prefill)
    if decode := document.get("decode"):
        figures["throughput_at_0"] = min(row["throughput"] for row in decode["0"].values())
        figures["decode_latency_at_8/9"] = max(
            row["decode_latency"] for row in decode["8/9"].values()
        )
    if turns := document.get("turns"):
        figures["second_turn_ttft"] = max(row["ttft"] for row in turns.values())
    if capacity := document.get("capacity"):
        figures["capacity_vs_ideal_at_8/9"] = capacity["8/9"]["vs_ideal"]
    if load := document.get("load"):
        for name in ("throughput", "ttft_p50", "ttft_p99"):
            figures[f"load_{name}"] = load[name]
    return figures


def goals_met(document: dict[str, Any]) -> dict[str, Any]:
    """Each goal's worst figure and whether it holds, for the scenarios that were run."""
    figures = worst_figures(document)
    met = {}
    for name, (relation, goal) in GOALS.items():
        if name in figures:
            holds = _RELATIONS[relation](figures[name], goal)
            met[name] = {"figure": figures[name], "goal": f"{relation} {goal}", "met": holds}
    return met


def _print_header(title: str, columns: str) -> None:
    print(f"\n{title}\n" + "".join(f"{name:>11}" for name in columns.split()))


def print_prefill(rows: list[dict[str, Any]]) -> None:
    _print_header(
        "prefill",
        "ratio batch stock/ms ours/ms encoder/ms speed-up ideal vs-ideal vs-rows stages",
    )
    for row in rows:
        print(
            f"{row['ratio']:>11}{row['batch']:>11}{row['stock_ms']:>11.0f}{row['ours_ms']:>11.0f}"
            f"{row['stock_encoder_ms']:>11.0f}{row['speed_up']:>11.2f}{row['ideal']:>11.2f}"
            f"{row['vs_ideal']:>11.3f}{row['vs_stock_rows']:>11.3f}{row['stages_share']:>11.2%}"
        )


def print_decode(ratios: dict[str, Any]) -> None:
    _print_header("decode, ours over stock", "ratio running step/ms latency throughput")
    for ratio, batches in ratios.items():
        for batch, row in batches.items():
            print(
                f"{ratio:>11}{batch:>11}{row['stock_decode_step_ms']:>11.1f}"
                f"{row['decode_latency']:>11.3f}{row['throughput']:>11.3f}"
            )


def print_turns(ratios: dict[str, Any]) -> None:
    _print_header(
        "second turn about a picture: time to first token, and prompt tokens reused",
        "ratio stock/ms ours/ms ours/stock stock-hits ours-hits",
    )
    for ratio, row in ratios.items():
        hits = [
            f"{row[f'{engine}_reused_tokens']:.0f}/{row[f'{engine}_prompt_tokens']:.0f}"
            for engine in ("stock", "ours")
        ]
        print(
            f"{ratio:>11}{row['stock_ttft_ms']:>11.0f}{row['ours_ttft_ms']:>11.0f}"
            f"{row['ttft']:>11.3f}{hits[0]:>11}{hits[1]:>11}"
        )


def print_capacity(ratios: dict[str, Any]) -> None:
    _print_header(
        "requests at once in the same KV memory",
        "ratio stock ideal vs-ideal ours ideal vs-ideal preempted",
    )
    for ratio, row in ratios.items():
        print(
            f"{ratio:>11}{row['stock_most']:>11.0f}{row['stock_ideal']:>11.2f}"
            f"{row['stock_vs_ideal']:>11.3f}{row['most']:>11.0f}{row['ideal']:>11.2f}"
            f"{row['vs_ideal']:>11.3f}{row['preemptions']:>11.0f}"
        )


def print_load(row: dict[str, Any]) -> None:
    _print_header(
        f"open load, {row['arrivals_per_second']:.1f} arrivals/s, {row['clients']} clients at "
        "most: time from arrival to first token",
        "engine requests/s p50/ms p99/ms",
    )
    for engine in ("stock", "ours"):
        print(
            f"{engine:>11}{row[f'{engine}_requests_per_second']:>11.2f}"
            f"{row[f'{engine}_ttft_p50_ms']:>11.0f}{row[f'{engine}_ttft_p99_ms']:>11.0f}"
        )
    print(
        f"{'ours/stock':>11}{row['throughput']:>11.3f}"
        f"{row['ttft_p50']:>11.3f}{row['ttft_p99']:>11.3f}"
    )


def print_tables(document: dict[str, Any]) -> None:
    """The same figures for people."""
    tables: dict[str, Callable[[Any], None]] = {
        "prefill": print_prefill,
        "decode": print_decode,
        "turns": print_turns,
        "capacity": print_capacity,
        "load": print_load,
    }
    for name, table in tables.items():
        if name in document:
            table(document[name])
    print()
    for name, goal in document["goals"].items():
        print(f"{'met' if goal['met'] else 'MISSED':>6} {name} {goal['figure']:.3f} {goal['goal']}")


def measure(rounds: Rounds, scenario: str, batches: list[int], tokens: int) -> Any:
    """A scenario's rows: a list, or by ratio, or one."""
    match scenario:
        case "prefill":
            return [
                measure_prefill(rounds, ratio, batch) | {"ratio": name, "batch": batch}
                for batch in batches
                for name, ratio in PREFILL_RATIOS.items()
            ]
        case "decode":
            return {
                name: {
                    str(batch): measure_decode(rounds, ratio, batch, tokens) for batch in batches
                }
                for name, ratio in DECODE_RATIOS.items()
            }
        case "turns":
            return {name: measure_turns(rounds, ratio) for name, ratio in TURN_RATIOS.items()}
        case "capacity":
            return {
                name: measure_capacity(rounds, ratio) for name, ratio in CAPACITY_RATIOS.items()
            }
        case _:
            return measure_load(rounds)


def series(scenario: str, num_batches: int) -> int:
    """How many times a scenario goes through its rounds."""
    return {
        "prefill": len(PREFILL_RATIOS) * num_batches,
        "decode": len(DECODE_RATIOS) * num_batches,
        "turns": len(TURN_RATIOS),
        "capacity": len(CAPACITY_RATIOS),
        "load": 1,
    }[scenario]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--rounds", type=int, default=7, help="medians are over these")
    parser.add_argument("--batches", default="1,4", help="requests that arrive at once")
    parser.add_argument("--tokens", type=int, default=32, help="answer length when decoding")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    shape = SHAPES[arguments.shape]
    batches = [int(batch) for batch in arguments.batches.split(",")]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(arguments.kv_cache_gib))
    options = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        # All of a batch's prompts fit one step: the bench times kernels, not queues.
        "max_num_batched_tokens": max(4096, max(batches) * (shape.visual_tokens + 128)),
        "max_num_seqs": max(MAX_NUM_SEQS, *batches),
        "enforce_eager": not arguments.compile,
        "limit_mm_per_prompt": {"image": 1},
    }
    total = arguments.rounds * sum(series(name, len(batches)) for name in arguments.scenarios)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        save_random_llava(checkpoint, shape, dtype="bfloat16")
        with (
            two_engines(checkpoint, options) as (stock, ours),
            tqdm(total=total, desc="rounds") as bar,
        ):
            rounds = Rounds(stock, ours, shape, arguments.rounds, bar)
            for batch in batches:  # caches, allocators and lazy kernels
                rounds.serve(rounds.asks(batch, 8 / 9, 4))
                rounds.serve(rounds.asks(batch, 0.0, 4))
            measured = {
                name: measure(rounds, name, batches, arguments.tokens)
                for name in arguments.scenarios
            }
    document = {
        "shape": arguments.shape,
        "rounds": arguments.rounds,
        "compiled": arguments.compile,
        "machine": {"processor": platform.processor(), "cpus": os.cpu_count()},
        **measured,
        "goals": goals_met(measured),
    }
    print_tables(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
