"""``python -m benchmarks.bench_http``: the load of ``make bench`` on configured servers.

Stock vLLM's server and ours run from the same configuration file and take turns;
``benchmarks/load.py`` defines the figures. ``--url`` measures a running server, without a
comparison.

Exit status 1 means that requests failed. The last line of standard output is a JSON document.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from benchmarks import load
from benchmarks.conditions import machine
from benchmarks.load import measure_load
from benchmarks.serving import ServerError
from benchmarks.tables import print_document
from benchmarks.traffic import Endpoint, RequestsFailedError, both_servers
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--config",
        type=Path,
        default=Path("configs/demo-cpu.yaml"),
        help="configuration of both servers; default: %(default)s",
    )
    where.add_argument("--url", help="root of a running server, instead of --config")
    add("--model", default=DEMO_NAME, help="model name in requests to --url; default: %(default)s")
    add("--tokenizer", help="folder or repository; default: the model's own")
    add("--ratios", nargs="+", default=["0", "2/3", "8/9"], help=f"pruning ratios, or {load.MIXED}")
    add(
        "--clients", nargs="+", type=int, default=[1, 16, 32], help="numbers of concurrent requests"
    )
    add("--rates", nargs="+", type=float, default=[], help="relative to stock's throughput")
    add("--requests", type=int, help="number in a run; default: three per client")
    add("--tokens", type=int, default=16, help="mean length of an answer")
    add("--rounds", type=int, default=3, help="number of runs; figures are medians")
    add("--seed", type=int, default=0, help="seed of images, text and lengths")
    arguments = parser.parse_args(argv)
    if arguments.url and arguments.rates:
        parser.error("--rates are relative to stock vLLM: use --config, not --url")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with ExitStack() as stack:
        stock = None
        if arguments.url:
            tokenizer = arguments.tokenizer or resolve(arguments.model)
            ours = Endpoint(arguments.url, arguments.model, tokenizer)
        else:
            config: dict[str, Any] = yaml.safe_load(arguments.config.read_text())
            stock, ours = stack.enter_context(both_servers(config, arguments.tokenizer))
        options = ("ratios", "clients", "rates", "requests", "rounds", "seed")
        conditions = {name: getattr(arguments, name) for name in options}
        try:
            rows = measure_load(ours, stock, answer_tokens=arguments.tokens, **conditions)
        except RequestsFailedError as error:
            print(error, file=sys.stderr)
            return 1
    print_document({"conditions": machine() | conditions, "load": rows})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(str(error))
