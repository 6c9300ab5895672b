"""``python -m evaluation.evaluate``: accuracy at each pruning ratio.

Asks every question of an exam at every ratio, and compares each example with ratio 0. The server is
a running one with this plugin (``--url``), or our own, started for each selector. Standard error
shows progress; standard output gets tables and, as its last line, a JSON document. Exit status 1
means that a request or a server failed: this ratio and later ones of its selector have no figures.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import openai
from tqdm.contrib.concurrent import thread_map  # type: ignore[import-untyped]

from benchmarks.conditions import command, machine
from benchmarks.plots import plot_accuracy
from benchmarks.serving import ServerError, running_server, server_arguments
from benchmarks.tables import print_document
from demo.questions import EXAMINED, exam
from evaluation.client import converse
from evaluation.exam import Example, read_exam, write_exam
from evaluation.max_pixels import MAX_PIXELS, scaled_down_arguments
from evaluation.report import Cell, is_zero, tables
from evaluation.scoring import SCORERS
from vitcop_server.calibrate.command import parse_ratio
from vitcop_server.calibrate.folder import FolderError
from vitcop_vllm.pruning.settings import AUTO, RATIO_HEADER, SELECTOR_NAMES, SelectorName

Selector = SelectorName | Literal["max_pixels"]
RATIOS = ("0", "1/3", "2/3", "7/9", "8/9", "17/18")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make eval",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="exam folder, in place of the demo exam")
    add("--per-family", type=int, default=100, help="conversations per family of the demo exam")
    kinds: dict[str, Any] = {"choices": EXAMINED, "default": EXAMINED, "metavar": "KIND"}
    add("--families", nargs="+", **kinds, help="families of the demo exam")
    add("--seed", type=int, default=0, help="seed of the demo exam")
    add("--varied-sizes", action="store_true", help="images that are not square")
    add("--scorer", choices=SCORERS, default="exact", help="rule for right answers")
    ratios = "fractions, decimals or auto; with 0, the others are compared with it"
    add("--ratios", nargs="+", type=_ratio, default=RATIOS, metavar="R", help=ratios)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="a running server, such as http://host:8000/v1")
    names: dict[str, Any] = {"choices": [*SELECTOR_NAMES, MAX_PIXELS], "default": ["vitcop"]}
    selectors_help = (
        f"start our own server with each of these; {MAX_PIXELS}: without pruning, one for each "
        "ratio, with images scaled down to as many tokens"
    )
    server.add_argument("--selectors", nargs="+", **names, help=selectors_help)
    add("--config", type=Path, default=Path("configs/demo-cpu.yaml"), help="of our own server")
    add("--model", help="in place of the first model that the server lists")
    add("--concurrency", type=int, default=8, help="concurrent conversations")
    add("--max-tokens", type=int, default=32, help="longest answer")
    add("--plot", type=Path, metavar="FILE.png", help="draw accuracy over ratio")
    arguments = parser.parse_args(argv)
    if MAX_PIXELS in arguments.selectors and AUTO in arguments.ratios:
        parser.error(f"{MAX_PIXELS} has no ratio {AUTO}: leave one of them out")
    return arguments


def _ratio(text: str) -> str:
    if text != AUTO:
        parse_ratio(text)
    return text


def measure(
    examples: Sequence[Example],
    selector: Selector | None,
    arguments: argparse.Namespace,
    cells: list[Cell],
) -> None:
    """Add a cell to ``cells`` for each ratio.

    Raises:
        openai.OpenAIError: If a request fails.
        ServerError: If a server does not start, or ignores ratios.
    """
    # Unpruned answers are the same with every selector.
    ratios = [
        ratio
        for ratio in arguments.ratios
        if not (is_zero(ratio) and any(cell.is_baseline for cell in cells))
    ]
    if selector is None:
        cells.extend(_cells(arguments.url, None, ratios, examples, arguments))
        return
    print(f"starting the server with {selector}", file=sys.stderr)
    if selector != MAX_PIXELS:
        options = server_arguments(selector, arguments.config)
        with running_server(*options) as (url, _):
            cells.extend(_cells(f"{url}/v1", selector, ratios, examples, arguments))
        return
    for ratio in ratios:
        options = scaled_down_arguments(arguments.config, Fraction(ratio), examples)
        with running_server(*options) as (url, _):
            cells.extend(_cells(f"{url}/v1", selector, [ratio], examples, arguments))


def _cells(
    url: str,
    selector: Selector | None,
    ratios: Sequence[str],
    examples: Sequence[Example],
    arguments: argparse.Namespace,
) -> Iterator[Cell]:
    """A cell for each ratio, from a running server."""
    api_key = os.environ.get("OPENAI_API_KEY", "none")
    with openai.OpenAI(base_url=url, api_key=api_key) as client:
        model = arguments.model or client.models.list().data[0].id
        for ratio in ratios:
            asked_ratio = "0" if selector == MAX_PIXELS else ratio
            value = AUTO if asked_ratio == AUTO else f"{float(Fraction(asked_ratio)):.9f}"
            asked = client.with_options(default_headers={RATIO_HEADER: value})
            ask = partial(converse, asked, model, arguments.max_tokens)
            progress = {"max_workers": arguments.concurrency, "desc": f"ratio {ratio}"}
            answers = thread_map(ask, examples, **progress)
            if not hasattr(answers[0][0].usage, "visual_tokens"):
                # Every ratio would look as good as 0.
                raise ServerError(f"the server ignores {RATIO_HEADER}: no visual_tokens in usage")
            scorer = SCORERS[arguments.scorer]
            yield Cell.of(model, selector or model, ratio, examples, answers, scorer)


def evaluate(arguments: argparse.Namespace) -> tuple[list[Cell], list[str]]:
    """Measured cells, and an error for each selector whose server or request failed.

    Raises:
        FolderError: If the exam has a bad line.
        OSError: If there is no exam.
    """
    cells: list[Cell] = []
    failures = []
    with TemporaryDirectory() as scratch:
        folder = arguments.data
        if folder is None:
            folder = Path(scratch)
            of = arguments.per_family, arguments.seed, arguments.families
            write_exam(folder, exam(*of, varied=arguments.varied_sizes))
        examples = read_exam(folder)
        for selector in [None] if arguments.url else arguments.selectors:
            try:
                measure(examples, selector, arguments, cells)
            except (ServerError, openai.OpenAIError) as error:
                failures.append(f"{selector or arguments.url}: {error}")
            except KeyboardInterrupt:
                failures.append("interrupted")
                break
    return cells, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print, and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        cells, failures = evaluate(arguments)
    except (FolderError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if cells:
        conditions = {
            "command": command("make eval", argv),
            **({} if arguments.url else machine()),  # --url may name another machine
            "model": cells[0].model,
        }
        document = {"conditions": conditions, **tables(cells)}
        print_document(document)
        if arguments.plot:
            plot_accuracy(document, arguments.plot)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
