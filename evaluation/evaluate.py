"""``python -m evaluation.evaluate``: what pruning costs in right answers.

Asks a running OpenAI-compatible server (``--url``), or our own, started for each selector,
every question of an exam at every ratio, and compares with ratio 0 example by example.
Progress goes to standard error; standard output gets tables and, as its last line, a JSON
document. Status 1 means that some request failed, or some server.
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
from evaluation.client import UNPRUNED, Examiner, Ratio, RatioRefusedError, sentence
from evaluation.exam import ExamError, Example, digest, read_exam, write_exam
from evaluation.report import UNPRUNED_NAME, Cell, Document, ReportError, tables
from evaluation.scoring import SCORERS
from vitcop_vllm.pruning.settings import SELECTOR_NAMES

RATIOS = ("0", "1/3", "2/3", "7/9", "8/9", "17/18")
ALL = "all"


class Evaluation:
    """An exam, and the cells measured so far; ``--out`` may hold cells of an earlier run."""

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
        """Selectors and ratios of the cells that are still to be measured."""
        wanted = [
            (UNPRUNED_NAME if ratio == UNPRUNED else selector, ratio)
            for ratio in self._ratios.values()
        ]
        return [(name, one) for name, one in wanted if not self.document.cell(name, one.label)]

    async def measure(self, url: str, label: str | None) -> None:
        """Measure the missing cells that the server at ``url`` can add.

        Args:
            label: Name of its selector in tables; None names the server's model there.

        Raises:
            ServerError: If it answers nothing.
        """
        arguments = self._arguments
        api_key = os.environ.get("OPENAI_API_KEY") or "none"
        async with openai.AsyncOpenAI(base_url=url, api_key=api_key) as client:
            model = arguments.model
            if model is None:
                try:
                    model = (await client.models.list()).data[0].id
                except (openai.OpenAIError, IndexError) as error:
                    raise ServerError(f"{url} lists no model: {sentence(error)}") from None
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
        if self._arguments.out:  # An interrupted run leaves its cells to the next one.
            self.document.write(self._arguments.out)
        if cell.refusal is None and not any(map(any, cell.scores.values())):
            raise ServerError(f"not one answer at ratio {ratio.label}: {next(iter(cell.errors))}")


def _version(url: str) -> str | None:
    """vLLM's version, from its own route; None for other servers."""
    try:
        address = url.rstrip("/").removesuffix("/v1") + "/version"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(arguments: argparse.Namespace) -> tuple[Document, list[str]]:
    """Measure as ``arguments`` say.

    Returns:
        The document, and a sentence for each server that failed.

    Raises:
        ExamError: If the exam cannot be asked.
        ReportError: If an earlier run's document has other conditions.
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
    exam.add_argument("--data", type=Path, metavar="DIR", help="an exam's folder (default: demo)")
    exam.add_argument("--per-family", type=int, default=100, help="conversations of a kind, demo")
    exam.add_argument("--seed", type=int, default=0, help="of the demo exam")
    exam.add_argument("--scorer", choices=SCORERS, default="exact", help="when an answer is right")
    exam.add_argument(
        "--ratios",
        nargs="+",
        type=_ratio,
        default=[Ratio.parse(text) for text in RATIOS],
        metavar="R",
        help="fractions or decimals; none sends no ratio, for servers that know of none",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", help="a running server, as in http://host:8000/v1")
    server.add_argument("--model", help="the first that the server lists by default")
    server.add_argument("--label", help="selector that the server at --url runs with, for tables")
    server.add_argument(
        "--selectors",
        nargs="+",
        choices=[*SELECTOR_NAMES, ALL],
        help="start our own server with each of these; vitcop by default",
    )
    server.add_argument("--config", type=Path, default=Path("configs/demo-cpu.yaml"))
    server.add_argument("--concurrency", type=int, default=8, help="examples at a time")
    server.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="write the document there; if the file exists, go on with what it lacks",
    )
    results.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over ratio")
    arguments = parser.parse_args(argv)
    if arguments.url and arguments.selectors:
        parser.error("--selectors starts servers: with --url, say with --label what it runs with")
    if arguments.label and not arguments.url:
        parser.error("--label names what the server at --url runs with")
    if not (arguments.url or arguments.config.is_file()):
        parser.error(f"--config: there is no file {arguments.config}")
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
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
