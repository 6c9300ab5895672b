"""``vitcop-bench``: vLLM's serving benchmark of a running server, at several pruning ratios.

    vitcop-bench --base-url http://127.0.0.1:8000 --ratios 0 2/3 8/9 [any flag of vllm bench serve]

In each round the ratios take turns, so that a slow minute of the machine slows all of them. Each
run has its own images, so that no server finds one in a cache. ``throughput`` is over that of stock
vLLM's server if ``--stock-url`` names one, and otherwise over that at ratio 0, in the same round;
figures are medians of the rounds.

Exit status 1 means that requests failed. The last line of standard output is a JSON document.
"""

import argparse
import io
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from fractions import Fraction
from itertools import count
from statistics import median
from typing import Any

from vitcop_vllm.pruning.settings import RATIO_HEADER

DEFAULTS = (
    *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
    *("--dataset-name", "random-mm", "--random-input-len", "40", "--random-output-len", "16"),
    *("--random-mm-bucket-config", "{(336, 336, 1): 1.0}"),
    *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
    *("--num-prompts", "48", "--max-concurrency", "16", "--temperature", "0"),
    *("--ignore-eos", "--disable-tqdm"),
    "--save-detailed",  # keeps the texts of errors
)
"""Flags of ``vllm bench serve``; those of the command line come after them and win."""

STOCK = "stock"

FIGURES = {
    "requests_per_second": "request_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "token_p50_ms": "median_tpot_ms",
}
"""Our names of figures -> vLLM's."""


class RequestsFailedError(RuntimeError):
    """Some requests failed."""


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our arguments, and the flags for vLLM's benchmark."""
    parser = argparse.ArgumentParser(
        prog="vitcop-bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="our server; default: %(default)s"
    )
    parser.add_argument("--stock-url", help="a server of stock vLLM to compare with")
    parser.add_argument(
        "--ratios", nargs="+", default=["0", "2/3", "8/9"], help="default: 0 2/3 8/9"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    # The images of an earlier call may be in a server's caches.
    first = secrets.randbelow(10**9)
    parser.add_argument(
        "--seed", type=int, default=first, help="seed of the first run; default: random"
    )
    arguments, flags = parser.parse_known_args(argv)
    for ratio in arguments.ratios:
        try:
            Fraction(ratio)
        except (ValueError, ZeroDivisionError):
            parser.error(
                f"--ratios must be numbers or fractions, such as 0.889 or 8/9; got {ratio}"
            )
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if not 0 <= arguments.seed < 2**31:
        parser.error("--seed must be from 0 to 2147483647")
    return arguments, flags


def run_benchmark(url: str, ratio: str, seed: int, flags: Sequence[str]) -> dict[str, float]:
    """Figures of one run of vLLM's benchmark.

    Args:
        url: Base URL of the server.
        ratio: A pruning ratio, or :data:`STOCK` to send none.
        seed: Seed of images, text and arrivals.
        flags: Flags of vLLM's benchmark, except those of the run.

    Raises:
        RequestsFailedError: If a request failed.
    """
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    header = [] if ratio == STOCK else ["--header", f"{RATIO_HEADER}={float(Fraction(ratio)):.6f}"]
    run = ["--base-url", url, "--seed", str(seed), *header]
    with redirect_stdout(io.StringIO()):  # standard output is for our table and document
        result = bench_serve(parser.parse_args([*DEFAULTS, *flags, *run]))
    check_answered(result)
    return {name: float(result[field]) for name, field in FIGURES.items()}


def check_answered(result: Mapping[str, Any]) -> None:
    """Check a result of vLLM's benchmark.

    Raises:
        RequestsFailedError: If a request failed.
    """
    if result["failed"]:
        errors = sorted({error.splitlines()[-1] for error in result["errors"] if error})
        raise RequestsFailedError(f"{result['failed']} requests failed: {'; '.join(errors)}")


def measure(arguments: argparse.Namespace, flags: Sequence[str]) -> list[dict[str, Any]]:
    """A row of medians per ratio, and one of stock vLLM's server if it is named."""
    urls = dict.fromkeys(arguments.ratios, arguments.base_url)
    if arguments.stock_url:
        urls[STOCK] = arguments.stock_url
    rounds: list[dict[str, dict[str, float]]] = []
    names = list(urls)
    seeds = count(arguments.seed)
    for number in range(arguments.rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        rounds.append({name: run_benchmark(urls[name], name, next(seeds), flags) for name in order})
    base = STOCK if STOCK in urls else next((name for name in names if not Fraction(name)), None)
    rows = []
    for name in names:
        row: dict[str, Any] = {"ratio": name}
        row |= {figure: median(run[name][figure] for run in rounds) for figure in FIGURES}
        if base is not None:
            key = "requests_per_second"
            row["throughput"] = median(run[name][key] / run[base][key] for run in rounds)
        rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]], seed: int) -> None:
    """Print a table, then the JSON document."""
    names = list(rows[0])
    print("".join(name.rjust(len(name) + 4) for name in names))
    for row in rows:
        cells = [row[name] if name == "ratio" else f"{row[name]:.4g}" for name in names]
        print("".join(cell.rjust(len(name) + 4) for name, cell in zip(names, cells, strict=True)))
    print(json.dumps({"seed": seed, "bench": list(rows)}))


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns its exit status."""
    arguments, flags = parse_arguments(argv)
    try:
        rows = measure(arguments, flags)
    except RequestsFailedError as error:
        print(error, file=sys.stderr)
        return 1
    print_rows(rows, arguments.seed)
    return 0
