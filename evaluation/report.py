"""Measured cells, their accuracies, and the document and tables that show them.

A cell is one exam at one ratio with one selector. A document holds every score, so that a later run
can still pair each example with its score at ratio 0.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import BaseModel, ValidationError
from rich import box
from rich.table import Table

from evaluation.client import UNPRUNED, Outcome, Ratio, Usage
from evaluation.exam import Example
from evaluation.intervals import (
    Interval,
    interval_of_mean,
    paired_difference,
    wilson,
)

UNPRUNED_NAME = "unpruned"
"""Selector of the cell at ratio 0, which is the baseline of all selectors."""

Figures = dict[str, dict[str, Any]]
"""Figures per family; "mean" is the unweighted mean of the families."""


class ReportError(ValueError):
    """A document that cannot be read or continued."""


class Cell(BaseModel):
    """One selector at one ratio.

    Attributes:
        selector: Name of the selector; ``UNPRUNED_NAME`` at ratio 0.
        ratio: Label of the requested ratio.
        scores: Per family and example, in the exam's order: 0 or 1 for each turn, or None if
            the example failed.
        effective_ratio: Share of visual tokens removed, as the server reports it. This and the
            next two attributes are means over requests.
        visual_tokens: Visual tokens kept, averaged over layers.
        stages: Visual tokens kept in each stage.
        errors: Count of each error message.
        refusal: The server's reason for refusing the ratio.
    """

    selector: str
    ratio: str
    scores: dict[str, list[list[float] | None]] = {}
    effective_ratio: float | None = None
    visual_tokens: float | None = None
    stages: list[float] | None = None
    errors: dict[str, int] = {}
    refusal: str | None = None

    @classmethod
    def of(
        cls, selector: str, ratio: Ratio, examples: Sequence[Example], outcomes: Sequence[Outcome]
    ) -> Self:
        scores: dict[str, list[list[float] | None]] = defaultdict(list)
        errors: Counter[str] = Counter()
        usages = []
        for example, outcome in zip(examples, outcomes, strict=True):
            if isinstance(outcome, str):
                errors[outcome] += 1
                scores[example.family].append(None)
                continue
            scores[example.family].append([float(reply.is_right) for reply in outcome])
            usages += [reply.usage for reply in outcome if reply.usage is not None]
        return cls(
            selector=selector, ratio=ratio.label, scores=scores, errors=errors, **_means(usages)
        )

    @property
    def order(self) -> float:
        """Sort key: ratios in ascending order, then the cell without a ratio."""
        value = Ratio.parse(self.ratio).value
        return math.inf if value is None else float(value)

    @property
    def is_baseline(self) -> bool:
        return self.ratio == UNPRUNED.label


def _means(usages: Sequence[Usage]) -> dict[str, Any]:
    if not usages:
        return {}
    return {
        "effective_ratio": fmean(usage.ratio for usage in usages),
        "visual_tokens": fmean(usage.encoder * (1 - usage.ratio) for usage in usages),
        "stages": [fmean(kept) for kept in zip(*(usage.stages for usage in usages), strict=True)],
    }


def accuracies(cell: Cell) -> Figures:
    """Accuracies with their intervals.

    Turns of an example are about the same image, so an example counts once: its score is the mean
    of its turns. ``correct`` is the sum of scores, ``total`` the number of examples.
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
    """Accuracy minus that of ``baseline``, over the examples that both answered."""
    figures: Figures = {}
    for family, examples in cell.scores.items():
        pairs = [
            (fmean(pruned), fmean(unpruned))
            for pruned, unpruned in zip(examples, baseline.scores[family], strict=True)
            if pruned is not None and unpruned is not None
        ]
        if pairs:
            pruned, unpruned = zip(*pairs, strict=True)
            figures[family] = {
                "difference": fmean(pruned) - fmean(unpruned),
                "interval": paired_difference(pruned, unpruned),
            }
    return _with_mean(figures, cell, "difference")


def _with_mean(figures: Figures, cell: Cell, name: str) -> Figures:
    """Add the mean over families, unless a family has no figure."""
    if not figures or len(figures) < len(cell.scores):
        return figures
    values = [one[name] for one in figures.values()]
    intervals: list[Interval] = [one["interval"] for one in figures.values()]
    mean = {name: fmean(values), "interval": interval_of_mean(values, intervals)}
    return {**figures, "mean": mean}


class Document(BaseModel):
    """All measured cells, and their conditions."""

    conditions: dict[str, Any] = {}
    results: list[Cell] = []

    def add_conditions(self, **conditions: Any) -> None:
        """Record conditions of this run.

        Raises:
            ReportError: If the earlier run had other conditions.
        """
        for key, value in conditions.items():
            known = self.conditions.setdefault(key, value)
            if known != value:
                raise ReportError(f"the earlier run had {key} {known!r}, this one has {value!r}")

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
        """Per selector its cells by ratio; each has the common cell at ratio 0."""
        pruned = [cell for cell in self.results if not cell.is_baseline]
        common = [] if self.baseline is None else [self.baseline]
        return {
            name: sorted(
                [*common, *(cell for cell in pruned if cell.selector == name)],
                key=lambda cell: cell.order,
            )
            for name in dict.fromkeys(cell.selector for cell in pruned or self.results)
        }

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(family for cell in self.results for family in cell.scores))

    @property
    def failures(self) -> Counter[str]:
        """Count of each error message, over all cells."""
        return sum((Counter(cell.errors) for cell in self.results), Counter())

    def summary(self) -> dict[str, Any]:
        """The JSON document, with accuracies and differences."""
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
        """Write the summary as JSON; an interruption leaves the old file."""
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(self.summary()) + "\n")
        unfinished.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The document that :meth:`write` wrote, without cells with failed requests.

        Raises:
            ReportError: If the file holds no document.
        """
        try:
            document = cls.model_validate_json(path.read_text())
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise ReportError(f"{path}: not a document of this program: {error}") from None
        document.results = [cell for cell in document.results if not cell.errors]
        return document


def tables(document: Document) -> Iterator[Table | str]:
    """A table per selector, followed by its refusals and errors."""
    for name, cells in document.selectors.items():
        yield _table(name, cells, document)
        yield from dict.fromkeys(f"- {cell.refusal}" for cell in cells if cell.refusal is not None)
        yield from (
            f"! {count} x {error}" for cell in cells for error, count in cell.errors.items()
        )


def _table(name: str, cells: Sequence[Cell], document: Document) -> Table:
    baseline = document.baseline
    accuracy = [accuracies(cell) for cell in cells]
    difference = [
        {} if baseline is None or cell.is_baseline else differences(cell, baseline)
        for cell in cells
    ]
    table = Table(name, box=box.SIMPLE_HEAD)
    for cell in cells:
        table.add_column(cell.ratio + ("!" if cell.errors else ""), justify="right")
    for title, figures, key, sign in (
        ("accuracy / %", accuracy, "accuracy", ""),
        ("less ratio 0", difference, "difference", "+"),
    ):
        if any(figures):
            table.add_row(title)
            for family in (*document.families, "mean"):
                table.add_row(family, *(_percent(one.get(family), key, sign) for one in figures))
            table.add_section()
    table.add_row("effective ratio", *(_number(cell.effective_ratio, ".3f") for cell in cells))
    table.add_row("visual tokens", *(_number(cell.visual_tokens, ".1f") for cell in cells))
    stages = ("/".join(f"{kept:.0f}" for kept in cell.stages or ()) or "-" for cell in cells)
    table.add_row("in each stage", *stages)
    return table


def _percent(figure: dict[str, Any] | None, name: str, sign: str) -> str:
    if figure is None:
        return "-"
    value, low, high = (100 * one for one in (figure[name], *figure["interval"]))
    return f"{value:{sign}.1f} [{low:{sign}.0f}, {high:{sign}.0f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
