"""``python -m vitcop_vllm.lab.bench``: what pruning saves, beside what it should save.

Stock vLLM and ours run the same pictures with the same random weights, in alternating
rounds; figures are medians over rounds. The *ideal* speed-up counts tokens: the encoder
costs both what it was measured to cost stock, the decoder costs each layer its tokens.
*vs-rows* compares with what stock vLLM itself takes for text prompts of as many rows per
layer: a kernel that is slow for few rows is slow for both.
"""

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from vitcop_vllm.demo.checkpoint import (
    DEMO,
    LLAVA_1_5_7B,
    SMALL,
    LlavaShape,
    save_random_llava,
)
from vitcop_vllm.lab.engines import EngineProcess, Result, two_engines
from vitcop_vllm.pruning.plan import plan_counts
from vitcop_vllm.pruning.settings import PruningSettings

SHAPES = {"demo": DEMO, "small": SMALL, "llava-1.5-7b": LLAVA_1_5_7B}
RATIOS = {"2/3": 2 / 3, "7/9": 7 / 9, "8/9": 8 / 9}
TEXT = "What is in this picture? Answer in one word."

GOALS = {
    "prefill_vs_ideal": (">=", 1.0),
    "throughput_at_0": (">=", 0.98),
    "decode_latency_at_8/9": ("<=", 1.02),
    "stages_share_of_unpruned_prefill": ("<=", 0.02),
}


class Rounds:
    """Runs scenarios on both engines in turn and keeps every figure."""

    def __init__(self, stock: EngineProcess, ours: EngineProcess) -> None:
        self.stock, self.ours = stock, ours
        # One seed serves both engines once: no cache ever knows a picture.
        self._seeds = count(1)

    def pair(self, batch: int, ratio: float, max_tokens: int, turn: int) -> tuple[Result, Result]:
        """The same pictures on both; who goes first changes with ``turn``."""
        command: dict[str, Any] = {
            "seeds": [next(self._seeds) for _ in range(batch)],
            "ratio": ratio,
            "max_tokens": max_tokens,
            "text": TEXT,
        }
        if turn % 2:
            ours = self.ours.run("pictures", **command)
            return self.stock.run("pictures", **command), ours
        return self.stock.run("pictures", **command), self.ours.run("pictures", **command)

    def layer_seconds(self, batch: int, tokens: int, num_layers: int) -> float:
        """What a layer takes stock vLLM for text prompts of ``tokens`` tokens each."""
        seconds: float = self.stock.run("text", batch=batch, tokens=tokens)["seconds"]
        return seconds / num_layers


def measure_prefill(
    rounds: Rounds, shape: LlavaShape, batch: int, num_rounds: int, bar: tqdm
) -> list[dict[str, Any]]:
    """Prefill (one answer token) of ``batch`` requests, at each ratio."""
    settings = PruningSettings()
    boundaries = shallow, deep = settings.boundaries(shape.layers)
    layers = (shallow, deep - shallow, shape.layers - deep)
    rows = []
    for name, ratio in RATIOS.items():
        counts = plan_counts(settings, ratio, shape.layers, shape.visual_tokens)
        visual_average = counts.layer_average(boundaries, shape.layers)
        figures: dict[str, list[float]] = defaultdict(list)
        for turn in range(num_rounds):
            stock, ours = rounds.pair(batch, ratio, 1, turn)
            encoder = stock["encoder_seconds"]
            text = stock["prompt_tokens"] // batch - shape.visual_tokens
            share = (text + visual_average) / (text + shape.visual_tokens)
            ideal = encoder + (stock["seconds"] - encoder) * share
            kernels = encoder + sum(
                number * rounds.layer_seconds(batch, text + visual, shape.layers)
                for number, visual in zip(layers, counts.stages, strict=True)
            )
            for figure, value in {
                "stock_ms": stock["seconds"] * 1e3,
                "ours_ms": ours["seconds"] * 1e3,
                "stock_encoder_ms": encoder * 1e3,
                "speed_up": stock["seconds"] / ours["seconds"],
                "ideal": stock["seconds"] / ideal,
                "vs_ideal": ideal / ours["seconds"],
                "vs_stock_rows": kernels / ours["seconds"],
                "stages_share": ours["stage_seconds"] / stock["seconds"],
            }.items():
                figures[figure].append(value)
            bar.update()
        row: dict[str, Any] = {key: median(values) for key, values in figures.items()}
        row |= {"ratio": name, "batch": batch}
        row["vs_ideal_spread"] = [min(figures["vs_ideal"]), max(figures["vs_ideal"])]
        rows.append(row)
    return rows


def measure_decode(
    rounds: Rounds, batch: int, ratio: float, tokens: int, num_rounds: int, bar: tqdm
) -> dict[str, Any]:
    """Latency of a decode step, and of the whole, ours over stock."""
    latency, whole, stock_ms = [], [], []
    same = True
    for turn in range(num_rounds):
        stock, ours = rounds.pair(batch, ratio, tokens, turn)
        step = median(stock["decode_step_seconds"])
        latency.append(median(ours["decode_step_seconds"]) / step)
        whole.append(stock["seconds"] / ours["seconds"])
        stock_ms.append(step * 1e3)
        same &= stock["tokens"] == ours["tokens"]
        bar.update()
    return {
        "decode_latency": median(latency),
        "decode_latency_spread": [min(latency), max(latency)],
        "throughput": median(whole),
        "throughput_spread": [min(whole), max(whole)],
        "stock_decode_step_ms": median(stock_ms),
        "same_tokens": same,
    }


def goals_met(prefill: list[dict[str, Any]], decode: dict[str, Any]) -> dict[str, Any]:
    """Each goal's worst figure and whether it holds."""
    figures = {
        "prefill_vs_ideal": min(row["vs_ideal"] for row in prefill),
        "throughput_at_0": min(row["throughput"] for row in decode["0"].values()),
        "decode_latency_at_8/9": max(row["decode_latency"] for row in decode["8/9"].values()),
        "stages_share_of_unpruned_prefill": max(row["stages_share"] for row in prefill),
    }
    met = {}
    for name, (relation, goal) in GOALS.items():
        holds = figures[name] >= goal if relation == ">=" else figures[name] <= goal
        met[name] = {"figure": figures[name], "goal": f"{relation} {goal}", "met": holds}
    return met


def print_tables(document: dict[str, Any]) -> None:
    """The same figures for people."""
    columns = "ratio batch stock/ms ours/ms encoder/ms speed-up ideal vs-ideal vs-rows stages"
    print("\nprefill\n" + "".join(f"{name:>11}" for name in columns.split()))
    for row in document["prefill"]:
        print(
            f"{row['ratio']:>11}{row['batch']:>11}{row['stock_ms']:>11.0f}{row['ours_ms']:>11.0f}"
            f"{row['stock_encoder_ms']:>11.0f}{row['speed_up']:>11.2f}{row['ideal']:>11.2f}"
            f"{row['vs_ideal']:>11.3f}{row['vs_stock_rows']:>11.3f}{row['stages_share']:>11.2%}"
        )
    columns = "ratio running step/ms latency throughput"
    print("\ndecode, ours over stock\n" + "".join(f"{name:>11}" for name in columns.split()))
    for ratio, batches in document["decode"].items():
        for batch, row in batches.items():
            print(
                f"{ratio:>11}{batch:>11}{row['stock_decode_step_ms']:>11.1f}"
                f"{row['decode_latency']:>11.3f}{row['throughput']:>11.3f}"
            )
    print()
    for name, goal in document["goals"].items():
        print(f"{'met' if goal['met'] else 'MISSED':>6} {name} {goal['figure']:.3f} {goal['goal']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
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
        "max_num_seqs": max(batches),
        "enforce_eager": not arguments.compile,
        "limit_mm_per_prompt": {"image": 1},
    }
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        save_random_llava(checkpoint, shape, dtype="bfloat16")
        with two_engines(checkpoint, options) as (stock, ours):
            rounds = Rounds(stock, ours)
            for batch in batches:  # caches, allocators and lazy kernels
                rounds.pair(batch, 8 / 9, 4, 0)
                rounds.pair(batch, 0.0, 4, 0)
            total = arguments.rounds * len(batches) * (len(RATIOS) + 2)
            with tqdm(total=total, desc="rounds") as bar:
                prefill = [
                    row
                    for batch in batches
                    for row in measure_prefill(rounds, shape, batch, arguments.rounds, bar)
                ]
                decode = {
                    name: {
                        str(batch): measure_decode(
                            rounds, batch, ratio, arguments.tokens, arguments.rounds, bar
                        )
                        for batch in batches
                    }
                    for name, ratio in (("0", 0.0), ("8/9", 8 / 9))
                }
    document = {
        "shape": arguments.shape,
        "rounds": arguments.rounds,
        "compiled": arguments.compile,
        "machine": {"processor": platform.processor(), "cpus": os.cpu_count()},
        "prefill": prefill,
        "decode": decode,
        "goals": goals_met(prefill, decode),
    }
    print_tables(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
