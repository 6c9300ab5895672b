"""``python -m benchmarks.bench_http``: vLLM's serving benchmark, our server beside stock's.

What ``vllm bench serve`` does, with random images over HTTP, as a client sees it: with image
decoding, tokenizing and JSON. Both servers run from one configuration file and take turns at
images that neither has seen; figures are medians over rounds. With ``--url`` it is sent to a
server that runs already, and there is nothing to compare with.

Status 1 means that requests failed. The last line of standard output is a JSON document.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.conditions import machine
from benchmarks.rounds import summary
from benchmarks.serving import ServerError, running_server
from vitcop_vllm.demo.checkpoint import DEMO_NAME, resolve
from vitcop_vllm.pruning.settings import CONFIG_KEY, RATIO_HEADER

_OUR_SECTIONS = (CONFIG_KEY, "server")
_FIGURES = {
    "requests_per_second": "request_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "token_p50_ms": "median_tpot_ms",
}


@dataclass(frozen=True)
class Target:
    """A server under load, and the ratio it is asked for.

    Attributes:
        name: ``stock``, or the ratio as it was given.
        url: The server's root.
        ratio: Value of the header; ``None`` sends none.
    """

    name: str
    url: str
    ratio: str | None


class RequestsFailedError(RuntimeError):
    """Not every request was answered."""


def stock_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration file's options as stock vLLM takes them."""
    return {
        **{key: value for key, value in config.items() if key not in _OUR_SECTIONS},
        "model": resolve(config["model"]),
    }


def request_arguments(
    target: Target, model: str, tokenizer: str, clients: int, requests: int, seed: int
) -> list[str]:
    """Arguments of ``vllm bench serve``: an image, 40 tokens of text, 16 of answer."""
    header = () if target.ratio is None else ("--header", f"{RATIO_HEADER}={target.ratio}")
    return [
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", target.url, "--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"),
        *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        *("--random-mm-bucket-config", "{(336, 336, 1): 1.0}"),
        *("--random-input-len", "40", "--random-output-len", "16", "--ignore-eos"),
        *("--temperature", "0", "--max-concurrency", str(clients)),
        *("--num-prompts", str(requests), "--seed", str(seed), "--disable-tqdm"),
        *header,
    ]


def run_benchmark(arguments: Sequence[str]) -> dict[str, float]:
    """What vLLM's own benchmark measures.

    Raises:
        RequestsFailedError: If a request was not answered.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with redirect_stdout(sys.stderr):  # the last line of ours is for programs
        told = asyncio.run(main_async(parser.parse_args(list(arguments))))
    if told["failed"]:
        raise RequestsFailedError(f"{told['failed']} of {told['num_prompts']} requests failed")
    return {name: told[theirs] for name, theirs in _FIGURES.items()}


def memory_share(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags for each of two servers, where ``options`` leave all memory to the first."""
    told = {name.replace("_", "-") for name in options}
    if told & {"gpu-memory-utilization", "kv-cache-memory-bytes"}:
        return ()
    return "--gpu-memory-utilization", "0.45"


@contextmanager
def both_servers(config: Path, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """URLs of stock vLLM's server and of ours; ``options`` are what stock takes of ``config``."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        plain = Path(scratch) / "stock.yaml"
        plain.write_text(yaml.safe_dump(dict(options)))
        share = memory_share(options)
        stock, _ = servers.enter_context(running_server("--config", str(plain), *share, stock=True))
        ours, _ = servers.enter_context(running_server("--config", str(config), *share))
        yield stock, ours


def compare(
    targets: Sequence[Target], model: str, tokenizer: str, arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by number of clients and target; those of ours also over stock's."""
    total = len(arguments.clients) * arguments.rounds * len(targets)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    seed = arguments.seed
    for target in targets:  # caches, allocators and lazy kernels
        run_benchmark(request_arguments(target, model, tokenizer, 4, 8, seed))
    with tqdm(total=total, desc="runs") as bar:
        for clients in arguments.clients:
            figures: dict[str, dict[str, list[float]]] = {
                target.name: defaultdict(list) for target in targets
            }
            requests = max(arguments.requests, 2 * clients)
            for number in range(arguments.rounds):
                seed += 1
                first = number % len(targets)
                for target in (*targets[first:], *targets[:first]):
                    sent = request_arguments(target, model, tokenizer, clients, requests, seed)
                    for name, value in run_benchmark(sent).items():
                        figures[target.name][name].append(value)
                    bar.update()
            stock = figures.get("stock")
            for name, row in figures.items():
                if stock is not None and name != "stock":
                    for figure in ("requests_per_second", "ttft_p99_ms"):
                        row[f"{figure}_over_stock"] = [
                            ours / theirs
                            for ours, theirs in zip(row[figure], stock[figure], strict=True)
                        ]
            measured[str(clients)] = {
                name: summary(row, [figure for figure in row if figure.endswith("_over_stock")])
                for name, row in figures.items()
            }
    return measured


def print_table(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The same figures for people."""
    columns = ("clients", "ratio", "requests/s", "ttft/ms", "p99/ms", "token/ms", "of stock")
    print("".join(f"{column:>12}" for column in columns))
    for clients, rows in measured.items():
        for name, row in rows.items():
            cells = [row[figure] for figure in _FIGURES]
            share = row.get("requests_per_second_over_stock")
            print(
                f"{clients:>12}{name:>12}{cells[0]:>12.2f}"
                + "".join(f"{cell:>12.0f}" for cell in cells[1:])
                + (f"{share:>12.2f}" if share is not None else "")
            )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--config",
        type=Path,
        default=Path("configs/demo-cpu.yaml"),
        help="what both servers run from; by default %(default)s",
    )
    where.add_argument(
        "--url", help="root of a server that runs; of another model than demo, give --model"
    )
    parser.add_argument("--model", default=DEMO_NAME, help="its name in requests, with --url")
    parser.add_argument("--tokenizer", help="folder or repository; default: the model's")
    parser.add_argument("--ratios", nargs="+", default=["0", "2/3", "8/9"], help="asked of ours")
    parser.add_argument(
        "--clients", nargs="+", type=int, default=[1, 16, 32], help="requests at a time; a run each"
    )
    parser.add_argument("--requests", type=int, default=32, help="of a run; twice CLIENTS at least")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with ExitStack() as stack:
        if arguments.url:
            model, tokenizer = arguments.model, resolve(arguments.model)
            targets, ours = [], arguments.url
        else:
            options = stock_options(yaml.safe_load(arguments.config.read_text()))
            tokenizer = options["model"]
            model = options.get("served-model-name", tokenizer)
            stock, ours = stack.enter_context(both_servers(arguments.config, options))
            targets = [Target("stock", stock, None)]
        targets += [
            Target(ratio, ours, f"{float(Fraction(ratio)):.6f}") for ratio in arguments.ratios
        ]
        try:
            measured = compare(targets, model, arguments.tokenizer or tokenizer, arguments)
        except RequestsFailedError as error:
            print(error, file=sys.stderr)
            return 1
    print_table(measured)
    conditions = {name: getattr(arguments, name) for name in ("rounds", "requests", "seed")}
    print(json.dumps({**conditions, "machine": machine(), "clients": measured}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(str(error))
