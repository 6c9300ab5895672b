"""Accuracy against pruning ratio, as an image."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.client import Ratio
from evaluation.report import Cell, Document, Figures, ReportError, accuracies

# Okabe and Ito's colours, which colour-blind people tell apart; grey in the place of their
# yellow, which nobody sees on white. A selector looks the same in every plot.
_STYLES = {
    "vitcop": ("#D55E00", "o"),
    "cls": ("#0072B2", "s"),
    "random": ("#767676", "x"),
    "grid": ("#000000", "+"),
    "key_norm": ("#009E73", "^"),
    "fastv": ("#E69F00", "D"),
    "divprune": ("#CC79A7", "v"),
    "dart": ("#56B4E9", "P"),
}
_MAX_COLUMNS = 4
_WIDTH = 8.0
"""Inches. READMEs show images about 830 pixels wide: 10 points come to 14 pixels."""


Points = Sequence[tuple[float, Figures]]
"""Of one selector: effective ratio, ascending, and accuracies."""


def plot(document: Document, path: Path) -> None:
    """Write a PNG: the mean over families, and each family in small.

    Points stand at the ratio the server reports. The axis is logarithmic in the share of
    tokens kept: from 8/9 to 17/18 half of them go, as from 0 to 1/2.

    Raises:
        ReportError: If there is nothing to draw.
    """
    curves = {name: _points(cells) for name, cells in document.selectors.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        raise ReportError("nothing to plot: no accuracy at a known pruning ratio")
    families = document.families if len(document.families) > 1 else []
    columns = min(len(families), _MAX_COLUMNS) or 1
    rows = math.ceil(len(families) / columns)
    figure = Figure(figsize=(_WIDTH, 3.9 + 1.9 * rows), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[2.2, *(1 for _ in range(rows))])
    top = figure.add_subplot(grid[0, :])
    _draw(top, curves, "mean", document, bands=True)
    title = f"{document.conditions.get('model')}: accuracy" + (
        f", mean over {len(families)} kinds of question" if families else ""
    )
    top.set_title(title, loc="left")
    top.set_xlabel("pruning ratio (axis logarithmic in the share of visual tokens kept)")
    top.set_ylabel("accuracy / %")
    top.legend(ncols=2, frameon=False, title="bands: 95 % intervals", alignment="left")
    for number, family in enumerate(families):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _draw(axes, curves, family, document, bands=len(curves) <= 2)
        axes.set_title(family, loc="left", fontsize=9)
        axes.tick_params(labelsize=7, labelleft=number % columns == 0)
    figure.savefig(path, format="png", dpi=150)


def _points(cells: Sequence[Cell]) -> Points:
    points = []
    for cell in cells:
        figures = accuracies(cell)
        asked = Ratio.parse(cell.ratio).value
        ratio = asked if cell.effective_ratio is None else cell.effective_ratio
        if ratio is not None and figures:
            points.append((float(ratio), figures))
    return sorted(points, key=lambda point: point[0])


def _draw(
    axes: Axes,
    curves: Mapping[str, Points],
    family: str,
    document: Document,
    *,
    bands: bool,
) -> None:
    for name, points in curves.items():
        seen = [(_place(ratio), figures[family]) for ratio, figures in points if family in figures]
        places = [place for place, _ in seen]
        colour, marker = _STYLES.get(name, (None, "o"))
        [line] = axes.plot(
            places,
            [100 * figure["accuracy"] for _, figure in seen],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=2 if name == "vitcop" else 1.2,
            label=name,
            zorder=3 if name == "vitcop" else 2,
        )
        if bands:
            low, high = ([100 * figure["interval"][side] for _, figure in seen] for side in (0, 1))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    labels = {cell.ratio: Ratio.parse(cell.ratio).value for cell in document.results}
    ticks = {label: _place(float(value)) for label, value in labels.items() if value is not None}
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _place(ratio: float) -> float:
    return -math.log2(1 - ratio)
