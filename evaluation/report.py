"""Measured cells as the rows of a bench's document.

A cell is one exam at one ratio with one selector. A row holds the figures of all ratios in per
cent, and the limits of their 95 % intervals as ``RATIO_spread``.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean
from typing import Any, Self

from openai.types.chat import ChatCompletion

from evaluation.client import text_of
from evaluation.exam import Example
from evaluation.intervals import Estimate, mean_of, mean_score, paired_difference
from evaluation.scoring import Scorer
from vitcop_vllm.pruning.settings import AUTO

Row = dict[str, Any]


def is_zero(ratio: str) -> bool:
    """Whether a ratio as requested, such as "8/9" or "auto", is 0."""
    return ratio != AUTO and Fraction(ratio) == 0


MEAN = "mean of families"
"""Family of the row with the unweighted mean."""


@dataclass(frozen=True)
class Cell:
    """One selector at one ratio.

    Attributes:
        selector: Its name, or the model's if the server was running already.
        ratio: As requested, such as "8/9" or "auto".
        scores: Family -> the share of right turns of each example, in the exam's order. Turns of an
            example are about the same image, so an example counts once.
        pruned: Share of visual tokens removed, averaged over layers. Like ``stages``, the mean of
            what the server reports for each request.
        stages: Visual tokens kept in each stage.
    """

    model: str
    selector: str
    ratio: str
    scores: Mapping[str, Sequence[float]]
    pruned: float
    stages: Sequence[float]

    @classmethod
    def of(
        cls,
        model: str,
        selector: str,
        ratio: str,
        examples: Sequence[Example],
        answers: Sequence[Sequence[ChatCompletion]],
        scorer: Scorer,
    ) -> Self:
        """Score the answers to the turns of each example."""
        scores = defaultdict(list)
        for example, given in zip(examples, answers, strict=True):
            turns = zip(example.turns, given, strict=True)
            right = fmean(scorer(text_of(answer), turn.answers) for turn, answer in turns)
            scores[example.family].append(right)
        usages: list[Any] = [answer.usage for given in answers for answer in given]
        stages = zip(*(usage.visual_tokens["stages"] for usage in usages), strict=True)
        return cls(
            model,
            selector,
            ratio,
            scores,
            fmean(usage.pruning_ratio for usage in usages),
            [fmean(kept) for kept in stages],
        )

    @property
    def is_baseline(self) -> bool:
        return is_zero(self.ratio)

    def accuracies(self) -> dict[str, Estimate]:
        """Accuracy in each family."""
        return {family: mean_score(scores) for family, scores in self.scores.items()}

    def differences(self, baseline: "Cell") -> dict[str, Estimate]:
        """Accuracy in each family minus that of ``baseline``, paired by example."""
        return {
            family: paired_difference(scores, baseline.scores[family])
            for family, scores in self.scores.items()
        }


def tables(cells: Sequence[Cell]) -> dict[str, list[Row]]:
    """Name -> rows: mean accuracies, accuracies of families, differences to ratio 0, and tokens."""
    families = _rows(cells, Cell.accuracies)
    baseline = next((cell for cell in cells if cell.is_baseline), None)
    differences = []
    if baseline is not None:
        pruned = [cell for cell in cells if not cell.is_baseline]
        differences = _rows(pruned, lambda cell: cell.differences(baseline))
    return {
        "answers": [
            {name: value for name, value in row.items() if name != "family"}
            for row in families
            if row["family"] == MEAN
        ],
        "families": [row for row in families if row["family"] != MEAN],
        "less_ratio_0": differences,
        "tokens": [
            {
                "selector": cell.selector,
                "ratio": cell.ratio,
                "pruned": round(cell.pruned, 4),
                "stages": [round(kept, 1) for kept in cell.stages],
            }
            for cell in cells
        ],
    }


def _rows(cells: Sequence[Cell], figures: Callable[[Cell], dict[str, Estimate]]) -> list[Row]:
    """A row for each selector and family, with a column for each ratio."""
    rows: dict[tuple[str, str], Row] = {}
    for cell in cells:
        every = figures(cell)
        for family, estimate in {**every, MEAN: mean_of(every.values())}.items():
            key = cell.selector, family
            row = rows.setdefault(key, {"selector": cell.selector, "family": family})
            value, low, high = (round(100 * figure, 1) for figure in estimate)
            row |= {cell.ratio: value, f"{cell.ratio}_spread": [low, high]}
    return list(rows.values())
