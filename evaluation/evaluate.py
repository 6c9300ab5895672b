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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.conditions import processor_name
from benchmarks.plots import plot_accuracy as plot
from benchmarks.serving import ServerError, running_server, server_arguments
from evaluation.client import UNPRUNED, Examiner, Ratio, RatioRefusedError, sentence
from evaluation.exam import ExamError, Example, digest, from_demo, read_folder
from evaluation.report import UNPRUNED_NAME, Cell, Document, ReportError, merge, tables
from evaluation.scoring import SCORERS, check_answers
from vitcop_vllm.pruning.budgets import SELECTORS

RATIOS = ("0", "1/3", "2/3", "7/9", "8/9", "17/18")
ALL = "all"


@dataclass(frozen=True)
class Task:
    """Where examples come from, and the scorer they are meant for."""

    examples: Callable[[argparse.Namespace], list[Example]]
    scorer: str


def _generated_exam(arguments: argparse.Namespace) -> list[Example]:
    from demo.questions import exam

    return from_demo(exam(arguments.per_family, arguments.seed))


def _folder_exam(arguments: argparse.Namespace) -> list[Example]:
    return read_folder(arguments.data)


TASKS = {
    "demo": Task(_generated_exam, "exact"),
    "folder": Task(_folder_exam, "exact"),
}


class Evaluation:
    """An exam, and what has been measured with it so far."""

    def __init__(self, arguments: argparse.Namespace, examples: list[Example]) -> None:
        self._arguments = arguments
        self._examples = examples
        self._scorer = arguments.scorer or TASKS[arguments.task].scorer
        check_answers(examples, self._scorer)
        self._ratios: dict[str, Ratio] = {ratio.label: ratio for ratio in arguments.ratios}
        servers = 1 if arguments.url else len(arguments.selectors)
        pruned = [ratio for ratio in self._ratios.values() if ratio != UNPRUNED]
        cells = servers * len(pruned) + (UNPRUNED in self._ratios.values())
        self.bar = tqdm(total=len(examples) * cells, desc="examples")
        self.document = Document(conditions={})

    async def measure(self, url: str, label: str | None) -> None:
        """Ask everything that the server at ``url`` can add.

        Args:
            label: What to call its selector; None calls it by its model.

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
            if not self.document.conditions:
                self.document.conditions = self._conditions(url, model)
            examiner = Examiner(client, model, SCORERS[self._scorer], arguments.max_tokens)
            for ratio in self._ratios.values():
                selector = UNPRUNED_NAME if ratio == UNPRUNED else label or model
                if self.document.cell(selector, ratio.label) is None:
                    await self._measure_cell(examiner, selector, ratio)

    async def _measure_cell(self, examiner: Examiner, selector: str, ratio: Ratio) -> None:
        self.bar.set_postfix_str(f"{selector} at {ratio.label}")
        try:
            outcomes = await examiner.ask_all(
                self._examples, ratio, self._arguments.concurrency, self.bar.update
            )
        except RatioRefusedError as refusal:
            cell = Cell(selector=selector, ratio=ratio.label, refusal=str(refusal))
            self.bar.update(len(self._examples) - 1)
        else:
            cell = Cell.of(selector, ratio, self._examples, outcomes)
        self.document.results.append(cell)
        # A long run that is interrupted leaves what it has, to be merged with the rest.
        if self._arguments.out:
            self.document.write(self._arguments.out)
        if cell.refusal is None and not any(map(any, cell.scores.values())):
            raise ServerError(f"not one answer at ratio {ratio.label}: {next(iter(cell.errors))}")

    def _conditions(self, url: str, model: str) -> dict[str, object]:
        arguments = self._arguments
        generated = arguments.task == "demo"
        return {
            "task": arguments.task,
            "exam": digest(self._examples),
            "examples": Counter(example.family for example in self._examples),
            "per_family": arguments.per_family if generated else None,
            "seed": arguments.seed if generated else None,
            "scorer": self._scorer,
            "model": model,
            "vllm": _version(url),
            "max_tokens": arguments.max_tokens,
            "concurrency": arguments.concurrency,
            # Of a server elsewhere we know neither.
            "config": None if arguments.url else arguments.config.name,
            "machine": None
            if arguments.url
            else {"processor": processor_name(), "cpus": os.cpu_count()},
        }


def _version(url: str) -> str | None:
    """vLLM's version, from the route it has for that; None of other servers."""
    try:
        address = url.rstrip("/").removesuffix("/v1") + "/version"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(arguments: argparse.Namespace) -> tuple[Document, list[str]]:
    """Measure, as ``arguments`` say: the document, and sentences on servers that failed."""
    examples = TASKS[arguments.task].examples(arguments)
    evaluation = Evaluation(arguments, examples)
    failures = []
    with evaluation.bar:
        if arguments.url:
            try:
                asyncio.run(evaluation.measure(arguments.url, arguments.label))
            except ServerError as error:
                failures.append(str(error))
            return evaluation.document, failures
        for selector in arguments.selectors:
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
    exam = parser.add_argument_group("what to ask")
    exam.add_argument("--task", choices=TASKS, help="demo, or folder if --data is given")
    exam.add_argument("--data", type=Path, metavar="DIR", help="folder with *.jsonl and images")
    exam.add_argument("--per-family", type=int, default=100, help="examples generated of a kind")
    exam.add_argument("--seed", type=int, default=0, help="of the generated exam")
    exam.add_argument("--scorer", choices=SCORERS, help="the task's own by default: exact")
    exam.add_argument(
        "--ratios",
        nargs="+",
        type=_ratio,
        default=[Ratio.parse(text) for text in RATIOS],
        metavar="R",
        help="fractions or decimals; none sends no ratio, for servers that know of none",
    )
    server = parser.add_argument_group("whom to ask")
    server.add_argument("--url", help="a running server, as in http://host:8000/v1")
    server.add_argument("--model", help="the first that the server lists by default")
    server.add_argument("--label", help="selector that the server at --url runs with, for tables")
    server.add_argument(
        "--selectors",
        nargs="+",
        choices=[*SELECTORS, ALL],
        help="start our own server with each of these; vitcop by default",
    )
    server.add_argument("--config", type=Path, default=Path("configs/demo-cpu.yaml"))
    server.add_argument("--concurrency", type=int, default=8, help="examples asked at a time")
    server.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="FILE.json", help="write the document there")
    results.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over ratio")
    results.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="ask nothing: tables and plot of documents written before",
    )
    arguments = parser.parse_args(argv)
    if arguments.task is None:
        arguments.task = "demo" if arguments.data is None else "folder"
    if (arguments.task == "folder") != (arguments.data is not None):
        parser.error("--task folder and --data belong together")
    if arguments.url and arguments.selectors:
        parser.error("--selectors starts servers: with --url, say with --label what it runs with")
    if arguments.label and not arguments.url:
        parser.error("--label names what the server at --url runs with")
    if not (arguments.url or arguments.merge or arguments.config.is_file()):
        parser.error(f"--config: there is no file {arguments.config}")
    for path in (arguments.out, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
    for name in ("per_family", "concurrency", "max_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    chosen = arguments.selectors or ["vitcop"]
    arguments.selectors = list(SELECTORS) if ALL in chosen else list(dict.fromkeys(chosen))
    return arguments


def _ratio(text: str) -> Ratio:
    try:
        return Ratio.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print, and return the exit status."""
    arguments = parse_arguments(argv)
    failures: list[str] = []
    notes: list[str] = []
    try:
        if arguments.merge:
            document, notes = merge(arguments.merge)
        else:
            document, failures = run(arguments)
        for line in (*notes, *failures):
            print(line, file=sys.stderr)
        if document.results:
            if arguments.out:
                document.write(arguments.out)
            print(tables(document))
            print(json.dumps(document.summary()), flush=True)
            if arguments.plot:
                plot(document, arguments.plot)
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
