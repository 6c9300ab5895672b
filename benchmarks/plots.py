"""Plots over the pruning ratio: speed beside its ideal, and accuracy.

The axis of ratios is logarithmic in the share of kept tokens: the steps from 0 to 1/2 and from 8/9
to 17/18 both halve it, and look equal. Bands span the rounds, or are 95 % intervals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.engines import OURS
from benchmarks.load import MIXED

# Okabe and Ito's colours, which colour-blind people can distinguish; grey replaces their yellow,
# which is hard to see on white. A selector has the same style in every plot.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#767676", "#000000")
_SELECTORS = ("vitcop", "cls", "key_norm", "divprune", "fastv", "dart", "random", "grid")
_STYLES = dict(zip(_SELECTORS, zip(_COLOURS, "os^vDPx+", strict=True), strict=True))
_MAX_COLUMNS = 4
_WIDTH = 8.0
"""Inches. GitHub shows an image in a README about 830 pixels wide: 10 points are 14 pixels."""


@dataclass
class Curve:
    """Points of a curve: position on the axis, value and band; and their ideals, if any."""

    points: list[tuple[float, float, tuple[float, float]]] = field(default_factory=list)
    ideals: list[float] = field(default_factory=list)


def _place(ratio: float | Fraction) -> float:
    return -math.log2(1 - ratio)


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")


def _draw(
    axes: Axes, curves: Mapping[str, Curve], title: str, ticks: Mapping[str, float], bands: bool
) -> None:
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        colour, marker = _STYLES.get(name, (colour, "o"))
        width = 2.0 if name == OURS else 1.2
        places, values, limits = zip(*curve.points, strict=True)
        axes.plot(places, values, color=colour, marker=marker, ms=4, lw=width, label=name, zorder=2)
        if curve.ideals:
            axes.plot(places, curve.ideals, color=colour, linestyle="--", lw=1.0, alpha=0.7)
        if bands:
            low, high = zip(*limits, strict=True)
            axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def plot_speed(document: Mapping[str, Any], path: Path) -> bool:
    """Write a PNG with panels for prefill, clients and arrivals.

    Figures are relative to stock vLLM; dashed lines are ideals.

    Args:
        document: The bench's document.
        path: The PNG; not written without figures to plot.

    Returns:
        Whether there were figures to plot.
    """
    load = document.get("load", ())
    prefill = [row for row in document.get("prefill", ()) if row["selector"] == OURS]
    clients = [row for row in load if "rate" not in row and row["ratio"] != MIXED]
    arrivals = [row for row in load if "rate" in row]
    panels = [
        ("speed-up of prefill", prefill, "speed_up", ("batch", "image_size"), "ratio"),
        ("requests a second, clients", clients, "throughput", ("clients",), "ratio"),
        ("requests a second, arrivals", arrivals, "throughput", ("ratio",), "rate"),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return False
    figure = _figure(3.7)
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, rows, value, by, over) in zip(every, panels, strict=True):
        curves: dict[str, Curve] = {}
        ticks = {}
        for row in rows:
            place = math.log2(row["rate"]) if over == "rate" else _place(Fraction(row["ratio"]))
            ticks[str(row[over])] = place
            label = ", ".join(f"{name} {row[name]}" for name in by if name in row)
            curve = curves.setdefault(label, Curve())
            curve.points.append((place, row[value], row[f"{value}_spread"]))
            curve.ideals.append(row["ideal"])
        _draw(axes, curves, title, ticks, bands=True)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
        axes.set_xlabel("pruning ratio" if over == "ratio" else "arrivals over stock's throughput")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    every[0].set_ylabel("over stock vLLM")
    conditions = document["conditions"]
    where = conditions["processor"] if conditions["device"] == "cpu" else conditions["device_name"]
    title = f"{conditions['shape']} on {conditions['device']} ({where}); dashed: ideal"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, format="png", dpi=150)
    return True


def plot_accuracy(document: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: a large plot of the mean over families, and a small plot of each family.

    Args:
        document: The evaluation's document, or one with its rows ``answers`` only.
        path: The PNG.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in document.get("families", ()):
        panels.setdefault(row["family"], []).append(row)
    if len(panels) == 1:
        panels = {}
    mean = _accuracy_curves(document["answers"])
    ticks = {column: _place(Fraction(column)) for column in _ratios(document["answers"])}
    columns = min(len(panels), _MAX_COLUMNS) or 1
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.9 + 1.9 * rows)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[2.2, *(1 for _ in range(rows))])
    axes = figure.add_subplot(grid[0, :])
    _draw(axes, mean, f"{document['conditions']['model']}: accuracy", ticks, bands=True)
    axes.set_ylim(0, 103)
    axes.set_xlabel("pruning ratio (logarithmic in the share of kept visual tokens)")
    axes.set_ylabel("accuracy / %, mean over kinds of question")
    axes.legend(ncols=2, frameon=False, title="bands: 95 % intervals", alignment="left")
    for number, (family, measured) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        curves = _accuracy_curves(measured)
        _draw(axes, curves, family, ticks, bands=len(curves) <= 2)
        axes.set_ylim(0, 103)
    figure.savefig(path, format="png", dpi=150)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns with figures of a ratio, such as "8/9"; not of ``auto``, which has no place."""
    names = (name for row in rows for name in row if f"{name}_spread" in row and name != "auto")
    return list(dict.fromkeys(names))


def _accuracy_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """A curve for each selector; ratio 0 was measured with one and is the same with all."""
    unpruned = {name: rows[0][name] for name in ("0", "0_spread") if name in rows[0]}
    curves = {}
    for row in rows:
        filled = {**unpruned, **row}
        points = [
            (_place(Fraction(ratio)), filled[ratio], tuple(filled[f"{ratio}_spread"]))
            for ratio in _ratios([filled])
        ]
        curves[row["selector"]] = Curve(sorted(points))
    return curves
