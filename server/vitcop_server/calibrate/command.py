"""``vitcop-calibrate``: which pruning ratio is safe for my images?

    vitcop-calibrate FOLDER --url http://127.0.0.1:8000/v1 --keep 0.99 --state answers.jsonl

Asks a running server about the images of a folder, without pruning and at several ratios, and
reports the highest ratio at which answers stay what they are at ratio 0. It needs no right answers.

FOLDER has images; sub-folders are kinds of image, and each gets a ratio of its own. Each image is
asked one question for each --use, or each --question. If FOLDER has metadata.jsonl, the
conversations in it are asked instead:

    {"images_file_names": ["a.png"], "family": "dates", "turns": [{"question": "When ...?"}]}

An image agrees if all its answers do. Measures of agreement:

    exact    the same answer
    logprob  every token of the unpruned answer keeps at least half of its probability

A ratio is *proven* if a one-sided Clopper-Pearson bound of the share of images that agree reaches
--keep. Fewer than 299 images can never prove 99 % at 95 % confidence; the ratio *observed* on them
is shown beside. Bounds hold for images like these, if they are a random sample of yours, and for
each row of the table by itself.

Ratios are found by bisection, which assumes that agreement falls as the ratio rises; ratios beside
the one found are asked too. --scan asks at all ratios.

The key of the server is read from OPENAI_API_KEY. With --state, a second run asks nothing again.

Standard output gets the report, a snippet for the server's YAML file and, as its last line, a JSON
document; standard error shows progress. Exit status: 0, measured, whatever was found; 1, the
server cannot be measured or a request failed; 2, wrong arguments, no images, or a bad state file;
130, interrupted. Answers that came before an end are in the state file.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitcop_server.calibrate.agreement import Measure
from vitcop_server.calibrate.folder import USES, Conversation, FolderError, read_folder
from vitcop_server.calibrate.groups import Goal, make_groups, measure_groups
from vitcop_server.calibrate.measurement import Measurement, messages_of
from vitcop_server.calibrate.plot import plot_agreement
from vitcop_server.calibrate.report import Report, print_report
from vitcop_server.calibrate.server import RefusedError, Server, ServerError, answer_settings
from vitcop_server.calibrate.state import State, StateError

GRID = (
    *("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "2/3", "0.7"),
    *("0.75", "7/9", "0.8", "0.85", "8/9", "0.92", "17/18"),
)
"""Ratios: even steps, and the published ones, up to the usual largest."""

_REPEATED = 20
"""Conversations asked again at ratio 0."""

_TIMED = 20
"""Conversations that are timed at the chosen ratio and at 0."""

_SCORED_FIRST = 4
"""If the server scores the answer of none of these, it is not asked to score others."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vitcop-calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="images, or images and metadata.jsonl")
    add("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    add("--model", help="in place of the first model that the server lists")
    add("--keep", type=_share, default=0.99, help="share of images; default: %(default)s")
    add("--confidence", type=_share, default=0.95, help="default: %(default)s")
    add(
        "--ratios",
        nargs="+",
        type=parse_ratio,
        default=[parse_ratio(ratio) for ratio in GRID],
        metavar="R",
        help=f"the grid, decimals or fractions; default: {' '.join(GRID)}",
    )
    add("--scan", action="store_true", help="ask at all ratios of the grid")
    add(
        "--use",
        nargs="+",
        choices=USES,
        help=f"questions to ask; default: {' '.join(USES)}",
    )
    add("--question", action="append", help="ask this in place of the uses; may be repeated")
    add(
        "--measures",
        nargs="+",
        choices=("exact", "logprob"),
        default=["exact", "logprob"],
        help="the first chooses the ratio of the snippet; default: exact logprob",
    )
    add(
        "--least",
        type=_share,
        default=0.5,
        help="logprob: share of its probability that each token must keep; default: %(default)s",
    )
    add("--max-tokens", type=_count, default=64, help="longest answer; default: %(default)s")
    add("--concurrency", type=_count, default=4, help="requests at a time; default: %(default)s")
    add("--state", type=Path, metavar="FILE", help="JSON lines; answers are kept here")
    add("--plot", type=Path, metavar="FILE.png", help="draw agreement over the ratio")
    arguments = parser.parse_args(argv)
    arguments.measures = list(dict.fromkeys(arguments.measures))
    if arguments.use and arguments.question:
        parser.error("give --use or --question")
    if arguments.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return arguments


def parse_ratio(text: str) -> float:
    """A ratio from 0 to below 1, from a decimal or a fraction.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(-1)
    if not 0 <= ratio < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no fraction or decimal number from 0 to below 1"
        )
    return round(float(ratio), 6)  # what the header holds


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number between 0 and 1")
    return share


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def calibrate(arguments: argparse.Namespace, state: State, server: Server) -> Report:
    """Measure a server.

    Raises:
        FolderError: If the folder has no images.
        ServerError: If the server cannot be measured, or a request fails.
    """
    conversations = read_folder(arguments.folder, questions_of(arguments))
    settings = server.config()
    notes: list[str] = []
    grid = limit_grid(arguments.ratios, server, settings, conversations, notes)
    facts: dict[str, Any] = {
        "max_tokens": arguments.max_tokens,
        "settings": answer_settings(settings),
    }
    measurement = Measurement(
        server, conversations, state, facts, arguments.concurrency, arguments.least
    )
    refused = measurement.ask_baseline()
    kept = measurement.conversations
    repeated = kept[:_REPEATED]
    unstable = measurement.repeat_baseline(repeated)
    measures: list[Measure] = arguments.measures
    unscored = []
    if "logprob" in measures:
        first = kept[:_SCORED_FIRST]
        measurement.score(0.0, first)
        if len(measurement.unscored(first)) == len(first):
            measures = ["exact"]
            notes.append(
                "The server does not score answers (prompt_logprobs of a last assistant message, "
                "as vLLM does), so there is no measure logprob."
            )
        else:
            measurement.score(0.0, kept)
            unscored = measurement.unscored(kept)
    goal = Goal(arguments.keep, arguments.confidence)
    results = measure_groups(
        measurement, make_groups(kept), measures, grid, goal, scan=arguments.scan
    )
    report = Report(
        model=server.model,
        measurement=measurement,
        goal=goal,
        results=results,
        refused=refused,
        num_repeated=len(repeated),
        num_unstable=unstable,
        num_unscored=len(unscored),
        settings=settings or {},
        notes=notes,
    )
    if ratio := report.chosen_ratio:
        report = replace(report, time_shares=measurement.time_shares(ratio, kept[:_TIMED]))
    return report


def questions_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Use -> question, for images without ``metadata.jsonl``."""
    if arguments.question:
        return {question: question for question in arguments.question}
    return {use: USES[use] for use in arguments.use or USES}


def limit_grid(
    ratios: Sequence[float],
    server: Server,
    settings: dict[str, Any] | None,
    conversations: Sequence[Conversation],
    notes: list[str],
) -> list[float]:
    """The ratios above 0 that the server accepts, ascending; says in ``notes`` what is left out.

    The server's settings name the largest ratio. Behind a gateway that hides them, a question is
    asked at the highest ratio, then at lower ones.

    Raises:
        ServerError: If it accepts none.
    """
    grid = sorted({ratio for ratio in ratios if ratio})
    if settings is not None:
        largest = settings.get("max_pruning_ratio", 1.0)
        accepted = [ratio for ratio in grid if ratio <= largest]
        why = f"its max_pruning_ratio is {largest}"
    else:
        accepted, why = list(grid), ""
        messages = messages_of(conversations[0])[0]
        while accepted:
            try:
                server.ask(messages, accepted[-1])
                break
            except RefusedError as error:
                why = str(error)
                accepted.pop()
    if not accepted:
        raise ServerError(f"the server takes no ratio of the grid: {why or 'it has only 0'}")
    if len(accepted) < len(grid):
        left_out = " ".join(f"{ratio:.4g}" for ratio in grid[len(accepted) :])
        notes.append(f"The server does not take the ratios {left_out}: {why}.")
    return accepted


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns its exit status."""
    arguments = parse_arguments(argv)
    try:
        with closing(State(arguments.state)) as state:
            server = Server(arguments.url, arguments.model, arguments.max_tokens)
            report = calibrate(arguments, state, server)
    except (FolderError, StateError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except ServerError as error:
        print(error, file=sys.stderr)
        if arguments.state:
            print(f"Run again to go on: earlier answers are in {arguments.state}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print_report(report)
    if arguments.plot:
        plot_agreement(report.results, report.goal, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
