"""Measured cells, what they come to, and the document and tables that tell it.

A cell is one exam at one ratio with one selector. A document keeps every score in it, so that
documents of shorter runs can be merged and their differences still be paired.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from evaluation.client import UNPRUNED, Outcome, Ratio, Reply
from evaluation.exam import Example
from evaluation.intervals import (
    Interval,
    interval_of_mean,
    paired_difference,
    wilson,
)

UNPRUNED_NAME = "unpruned"
"""Selector of the cell at ratio 0, where there is nothing to select: it serves all of them."""

_SAME_EXAM = ("task", "exam", "scorer", "model", "max_tokens")
"""Conditions that documents must share for their figures to stand side by side."""

Figures = dict[str, dict[str, Any]]
"""Per family, and for "mean", the unweighted mean of families."""


class ReportError(ValueError):
    """Documents that cannot be read, or not be merged."""


class Cell(BaseModel):
    """One selector at one ratio.

    Attributes:
        selector: Which tokens are kept, by name; ``UNPRUNED_NAME`` at ratio 0.
        ratio: Label of the ratio asked for.
        scores: Per family and example, in the exam's order, the score of each turn; None where
            asking failed.
        effective_ratio: Share of visual tokens removed as the server reports it; like all
            that follow, a mean over requests.
        visual_tokens: Visual tokens kept, averaged over layers.
        stages: Visual tokens kept in each stage.
        latency_s, latency_p50_s: Mean and median seconds a request took.
        errors: How often each error came.
        refusal: Why the server does not do this ratio, else None.
    """

    selector: str
    ratio: str
    scores: dict[str, list[list[float] | None]] = {}
    effective_ratio: float | None = None
    visual_tokens: float | None = None
    stages: list[float] | None = None
    latency_s: float | None = None
    latency_p50_s: float | None = None
    errors: dict[str, int] = {}
    refusal: str | None = None

    @classmethod
    def of(
        cls, selector: str, ratio: Ratio, examples: Sequence[Example], outcomes: Sequence[Outcome]
    ) -> Self:
        scores = defaultdict(list)
        for example, outcome in zip(examples, outcomes, strict=True):
            turns = [reply.score for reply in outcome.replies]
            scores[example.family].append(turns or None)
        replies = [reply for outcome in outcomes for reply in outcome.replies]
        seconds = [reply.seconds for reply in replies]
        errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
        return cls(
            selector=selector,
            ratio=ratio.label,
            scores=scores,
            **_pruning(replies),
            latency_s=fmean(seconds) if seconds else None,
            latency_p50_s=median(seconds) if seconds else None,
            errors=dict(errors),
        )

    @property
    def order(self) -> float:
        """Ratios in ascending order; without one, after them."""
        value = Ratio.parse(self.ratio).value
        return math.inf if value is None else float(value)

    @property
    def is_baseline(self) -> bool:
        return self.ratio == UNPRUNED.label


def _pruning(replies: Sequence[Reply]) -> dict[str, Any]:
    """Means of what the server reports; nothing where some reply reports nothing."""
    told = [
        (reply.ratio, reply.encoder, reply.stages)
        for reply in replies
        if reply.ratio is not None and reply.encoder is not None and reply.stages is not None
    ]
    if not told or len(told) < len(replies):
        return {}
    return {
        "effective_ratio": fmean(ratio for ratio, _, _ in told),
        "visual_tokens": fmean(encoder * (1 - ratio) for ratio, encoder, _ in told),
        "stages": [fmean(kept) for kept in zip(*(stages for _, _, stages in told), strict=True)],
    }


def accuracies(cell: Cell) -> Figures:
    """Accuracy with its interval.

    An example counts once, however many turns it has: they are about the same image, so
    its score is their mean. ``correct`` sums those, ``total`` counts them.
    """
    figures: Figures = {}
    for family, examples in cell.scores.items():
        means = [fmean(turns) for turns in examples if turns is not None]
        if means:
            accuracy = fmean(means)
            figures[family] = {
                "correct": math.fsum(means),
                "total": len(means),
                "accuracy": accuracy,
                "interval": wilson(accuracy, len(means)),
            }
    return _with_mean(figures, cell, "accuracy")


def differences(cell: Cell, baseline: Cell) -> Figures:
    """Accuracy less that of ``baseline``, over the examples that both answered."""
    figures: Figures = {}
    for family, examples in cell.scores.items():
        pairs = [
            (fmean(ours), fmean(theirs))
            for ours, theirs in zip(examples, baseline.scores[family], strict=True)
            if ours is not None and theirs is not None
        ]
        if pairs:
            ours, theirs = zip(*pairs, strict=True)
            figures[family] = {
                "difference": fmean(ours) - fmean(theirs),
                "interval": paired_difference(ours, theirs),
            }
    return _with_mean(figures, cell, "difference")


def _with_mean(figures: Figures, cell: Cell, name: str) -> Figures:
    """Adds the mean over families, unless one of them has no figure."""
    if not figures or len(figures) < len(cell.scores):
        return figures
    values = [one[name] for one in figures.values()]
    intervals: list[Interval] = [one["interval"] for one in figures.values()]
    mean = {name: fmean(values), "interval": interval_of_mean(values, intervals)}
    return {**figures, "mean": mean}


class Document(BaseModel):
    """Everything measured, and under which conditions."""

    conditions: dict[str, Any]
    results: list[Cell] = []

    def cell(self, selector: str, ratio: str) -> Cell | None:
        found = (one for one in self.results if (one.selector, one.ratio) == (selector, ratio))
        return next(found, None)

    @property
    def baseline(self) -> Cell | None:
        """The cell at ratio 0, if it has been measured."""
        cell = self.cell(UNPRUNED_NAME, UNPRUNED.label)
        return cell if cell is not None and cell.scores else None

    @property
    def selectors(self) -> dict[str, list[Cell]]:
        """Per selector its cells by ratio, the common one at ratio 0 included."""
        names = dict.fromkeys(
            cell.selector for cell in self.results if not cell.is_baseline
        ) or dict.fromkeys([UNPRUNED_NAME])
        common = [] if self.baseline is None else [self.baseline]
        return {
            name: sorted(
                common
                + [one for one in self.results if one.selector == name and not one.is_baseline],
                key=lambda cell: cell.order,
            )
            for name in names
        }

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(family for cell in self.results for family in cell.scores))

    @property
    def failures(self) -> Counter[str]:
        """How often each error came, over all cells."""
        return sum((Counter(cell.errors) for cell in self.results), Counter())

    def summary(self) -> dict[str, Any]:
        """The document for other programs, with the figures that people are shown."""
        results = []
        for cell in self.results:
            figures: dict[str, Any] = {"accuracy": accuracies(cell)}
            if self.baseline is not None and not cell.is_baseline:
                figures["difference"] = differences(cell, self.baseline)
            results.append(
                {**cell.model_dump(exclude={"scores"}), **figures, "scores": cell.scores}
            )
        return {"conditions": self.conditions, "results": results}

    def write(self, path: Path) -> None:
        """Write the summary as JSON. An interruption leaves the file as it was before."""
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(self.summary()) + "\n")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote.

        Raises:
            ReportError: If the file holds no such document.
        """
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise ReportError(f"{path}: not a document of this program: {error}") from None


def merge(paths: Sequence[Path]) -> tuple[Document, list[str]]:
    """One document of several, and notes about what had to be decided.

    Raises:
        ReportError: If they are about different exams, or measured the same twice.
    """
    documents = {path: Document.read(path) for path in paths}
    first_path, first = next(iter(documents.items()))
    merged = Document(conditions={})
    notes = []
    for path, document in documents.items():
        for key in _SAME_EXAM:
            ours, theirs = first.conditions.get(key), document.conditions.get(key)
            if ours != theirs:
                raise ReportError(f"{path} has {key} {theirs!r}, but {first_path} has {ours!r}")
        for cell in document.results:
            known = merged.cell(cell.selector, cell.ratio)
            if known is None:
                merged.results.append(cell)
            elif not cell.is_baseline:
                raise ReportError(
                    f"{path} has {cell.selector} at {cell.ratio}, as a file before it"
                )
            elif known.scores != cell.scores:
                notes.append(f"{path} was scored differently at ratio 0; the first file's counts")
    for key in first.conditions:
        values = [document.conditions.get(key) for document in documents.values()]
        same = all(value == values[0] for value in values)
        merged.conditions[key] = values[0] if same else values
    return merged, notes


def tables(document: Document) -> str:
    """The same figures for people: one table per selector."""
    return "\n\n".join(_table(name, cells, document) for name, cells in document.selectors.items())


def _table(name: str, cells: Sequence[Cell], document: Document) -> str:
    baseline = document.baseline
    accuracy = [accuracies(cell) for cell in cells]
    difference = [
        {} if baseline is None or cell.is_baseline else differences(cell, baseline)
        for cell in cells
    ]
    rows = [[name, *(cell.ratio + ("!" if cell.errors else "") for cell in cells)]]
    for family in (*document.families, "mean"):
        rows.append([family, *(_percent(one.get(family), "accuracy", "") for one in accuracy)])
    if any(difference):
        rows.append(["less ratio 0", *("" for _ in cells)])
        for family in (*document.families, "mean"):
            rows.append(
                [family, *(_percent(one.get(family), "difference", "+") for one in difference)]
            )
    rows += [
        ["per request", *("" for _ in cells)],
        ["effective ratio", *(_number(cell.effective_ratio, ".3f") for cell in cells)],
        ["visual tokens", *(_number(cell.visual_tokens, ".1f") for cell in cells)],
        ["in each stage", *(_stages(cell) for cell in cells)],
        ["latency p50/s", *(_number(cell.latency_p50_s, ".2f") for cell in cells)],
    ]
    refusals = dict.fromkeys(f"- {cell.refusal}" for cell in cells if cell.refusal is not None)
    failures = [f"! {count} x {error}" for cell in cells for error, count in cell.errors.items()]
    return "\n".join([*_aligned(rows), *refusals, *dict.fromkeys(failures)])


def _percent(figure: dict[str, Any] | None, name: str, sign: str) -> str:
    if figure is None:
        return "-"
    value, low, high = (100 * one for one in (figure[name], *figure["interval"]))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _stages(cell: Cell) -> str:
    return "-" if cell.stages is None else "/".join(f"{kept:.0f}" for kept in cell.stages)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *texts in rows:
        columns = [f"{text:>{width}}" for text, width in zip(texts, widths[1:], strict=True)]
        yield "  ".join([f"{name:<{widths[0]}}", *columns]).rstrip()
