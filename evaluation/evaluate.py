"""``python -m evaluation.evaluate``: accuracy at each pruning ratio.

Asks every question of an exam at every ratio, and compares each example with ratio 0. The server is
a running OpenAI-compatible server (``--url``), or our own, started for each selector. Standard
error shows progress; standard output gets tables and, as its last line, a JSON document. Exit
status 1 means that a request or a server failed.
"""

import argparse
import asyncio
import json
import os
import sys
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
from rich.console import Console
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.plots import plot_accuracy
from benchmarks.serving import ServerError, running_server, server_arguments
from evaluation.client import UNPRUNED, Examiner, Ratio, RatioRefusedError, message_of
from evaluation.exam import ExamError, Example, digest, read_exam, write_exam
from evaluation.report import UNPRUNED_NAME, Cell, Document, ReportError, tables
from evaluation.scoring import SCORERS
from vitcop_vllm.pruning.settings import SELECTOR_NAMES

RATIOS = ("0", "1/3", "2/3", "7/9", "8/9", "17/18")
ALL = "all"


class Evaluation:
    """An exam and its measured cells, including those of an earlier run in ``--out``."""

    def __init__(self, arguments: argparse.Namespace, examples: list[Example]) -> None:
        self._arguments = arguments
        self._examples = examples
        self._ratios: dict[str, Ratio] = {ratio.label: ratio for ratio in arguments.ratios}
        out = arguments.out
        self.document = Document.read(out) if out is not None and out.exists() else Document()
        self.document.add_conditions(
            exam=digest(examples),
            examples=Counter(example.family for example in examples),
            scorer=arguments.scorer,
            max_tokens=arguments.max_tokens,
            config=None if arguments.url else arguments.config.name,
        )
        self.bar = tqdm(desc="examples", total=0)

    def missing(self, selector: str) -> list[tuple[str, Ratio]]:
        """Selector and ratio of each cell that is not measured yet."""
        wanted = [
            (UNPRUNED_NAME if ratio == UNPRUNED else selector, ratio)
            for ratio in self._ratios.values()
        ]
        return [
            (name, ratio) for name, ratio in wanted if not self.document.cell(name, ratio.label)
        ]

    async def measure(self, url: str, label: str | None) -> None:
        """Measure the missing cells of the server at ``url``.

        Args:
            label: Name of the selector in tables; None takes the model's name.

        Raises:
            ServerError: If the server answers no request.
        """
        arguments = self._arguments
        api_key = os.environ.get("OPENAI_API_KEY") or "none"
        async with openai.AsyncOpenAI(base_url=url, api_key=api_key) as client:
            model = arguments.model
            if model is None:
                try:
                    model = (await client.models.list()).data[0].id
                except (openai.OpenAIError, IndexError) as error:
                    raise ServerError(f"{url} lists no model: {message_of(error)}") from None
            self.document.add_conditions(model=model, vllm=_version(url))
            examiner = Examiner(client, model, SCORERS[arguments.scorer], arguments.max_tokens)
            missing = self.missing(label or model)
            self.bar.total += len(missing) * len(self._examples)
            for selector, ratio in missing:
                await self._measure_cell(examiner, selector, ratio)

    async def _measure_cell(self, examiner: Examiner, selector: str, ratio: Ratio) -> None:
        self.bar.set_postfix_str(f"{selector} at {ratio.label}")
        try:
            outcomes = await examiner.ask_all(
                self._examples, ratio, self._arguments.concurrency, self.bar.update
            )
        except RatioRefusedError as refusal:
            cell = Cell(selector=selector, ratio=ratio.label, refusal=str(refusal))
            self.bar.update(len(self._examples))
        else:
            cell = Cell.of(selector, ratio, self._examples, outcomes)
        self.document.results.append(cell)
        if self._arguments.out:  # keeps the cells of an interrupted run
            self.document.write(self._arguments.out)
        if cell.refusal is None and not any(map(any, cell.scores.values())):
            raise ServerError(f"no answer at ratio {ratio.label}: {next(iter(cell.errors))}")


def _version(url: str) -> str | None:
    """vLLM's version, from its route ``/version``; None for other servers."""
    try:
        address = url.rstrip("/").removesuffix("/v1") + "/version"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(arguments: argparse.Namespace) -> tuple[Document, list[str]]:
    """Measure all cells.

    Returns:
        The document, and an error message for each server that failed.

    Raises:
        ExamError: If the exam cannot be asked.
        ReportError: If the earlier run's document has other conditions.
    """
    with TemporaryDirectory() as scratch:
        folder = arguments.data
        if folder is None:
            from demo.questions import exam

            folder = Path(scratch)
            write_exam(folder, exam(arguments.per_family, arguments.seed))
        evaluation = Evaluation(arguments, read_exam(folder))
        failures = []
        with evaluation.bar:
            if arguments.url:
                try:
                    asyncio.run(evaluation.measure(arguments.url, arguments.label))
                except ServerError as error:
                    failures.append(str(error))
                return evaluation.document, failures
            for selector in filter(evaluation.missing, arguments.selectors):
                evaluation.bar.set_postfix_str(f"starting the server with {selector}")
                try:
                    options = server_arguments(selector, arguments.config)
                    with running_server(*options) as (url, _):
                        asyncio.run(evaluation.measure(f"{url}/v1", selector))
                except ServerError as error:
                    failures.append(f"{selector}: {error}")
        return evaluation.document, failures


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make eval", description=__doc__)
    exam = parser.add_argument_group("exam")
    exam.add_argument(
        "--data", type=Path, metavar="DIR", help="exam folder; default: the demo exam"
    )
    exam.add_argument("--per-family", type=int, default=100, help="demo conversations per family")
    exam.add_argument("--seed", type=int, default=0, help="seed of the demo exam")
    exam.add_argument("--scorer", choices=SCORERS, default="exact", help="rule for right answers")
    exam.add_argument(
        "--ratios",
        nargs="+",
        type=_ratio,
        default=[Ratio.parse(text) for text in RATIOS],
        metavar="R",
        help="fractions or decimals; none sends no ratio, for servers without pruning",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="a running server, such as http://host:8000/v1")
    server.add_argument("--model", help="default: the first model that the server lists")
    server.add_argument("--label", help="selector of the server at --url, for tables")
    server.add_argument(
        "--selectors",
        nargs="+",
        choices=[*SELECTOR_NAMES, ALL],
        help="start our own server with each of these; default: vitcop",
    )
    server.add_argument("--config", type=Path, default=Path("configs/demo-cpu.yaml"))
    server.add_argument("--concurrency", type=int, default=8, help="concurrent examples")
    server.add_argument("--max-tokens", type=int, default=32, help="longest answer")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the document there; an existing document is continued",
    )
    results.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over ratio")
    arguments = parser.parse_args(argv)
    if arguments.url and arguments.selectors:
        parser.error("--selectors starts servers: with --url, name the selector with --label")
    if arguments.label and not arguments.url:
        parser.error("--label names the selector of the server at --url, which is missing")
    if not (arguments.url or arguments.config.is_file()):
        parser.error(f"--config: there is no file {arguments.config}")
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} for {path.name}")
    for name in ("per_family", "concurrency", "max_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    chosen = arguments.selectors or ["vitcop"]
    arguments.selectors = list(SELECTOR_NAMES) if ALL in chosen else list(dict.fromkeys(chosen))
    return arguments


def _ratio(text: str) -> Ratio:
    try:
        return Ratio.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print, and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        document, failures = run(arguments)
        for line in failures:
            print(line, file=sys.stderr)
        if document.results:
            # As wide as its tables, wherever it prints to.
            console = Console(width=1000, markup=False, emoji=False, highlight=False)
            for part in tables(document):
                console.print(part)
            print(json.dumps(document.summary()), flush=True)
            if arguments.plot:
                plot_accuracy(document, arguments.plot)
    except (ExamError, ReportError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = f"; {arguments.out} has what was measured" if arguments.out else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    if document.failures or failures:
        count = document.failures.total()
        print(f"FAILED: {count} examples, {len(failures)} servers", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
