"""Speed against pruning ratio, beside its ideal, as an image."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.engines import OURS
from benchmarks.load import MIXED
from benchmarks.rounds import Row

# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_IDEAL: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0, "alpha": 0.7}
_WIDTH = 8.0
"""Inches, as of the plot of accuracy."""

_HEIGHT = 3.7


def plot_speed(document: Mapping[str, Any], path: Path) -> bool:
    """Write a PNG with a panel for each of prefill, clients and load that was measured.

    Figures are over stock vLLM's, dashed lines their ideals, bars the least and the greatest
    of a round.

    Args:
        document: Rows by scenario, and ``conditions``.
        path: Where to; left as it is where there is nothing to draw.

    Returns:
        Whether there was.
    """
    panels: list[tuple[str, Callable[[Axes, Sequence[Row]], None]]] = [
        ("prefill", _draw_prefill),
        ("clients", _draw_clients),
        ("load", _draw_load),
    ]
    panels = [(name, draw) for name, draw in panels if document.get(name)]
    if not panels:
        return False
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor="white")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, draw) in zip(every, panels, strict=True):
        draw(axes, document[name])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    every[0].set_ylabel("over stock vLLM")
    conditions = document["conditions"]
    where = conditions["processor"] if conditions["device"] == "cpu" else conditions["device_name"]
    figure.suptitle(
        f"{conditions['shape']} on {conditions['device']} ({where}); dashed: ideal",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.savefig(path, format="png", dpi=150)
    return True


def _draw_prefill(axes: Axes, rows: Sequence[Row]) -> None:
    ours = [row for row in rows if row["selector"] == OURS]
    cases = dict.fromkeys((row["batch"], row.get("image_size")) for row in ours)
    for (batch, size), colour in zip(cases, _COLOURS, strict=False):
        curve = [row for row in ours if (row["batch"], row.get("image_size")) == (batch, size)]
        label = f"{batch} at once" + (f", {size} px" if size else "")
        places = [_place(row["ratio"]) for row in curve]
        _points(axes, places, curve, "speed_up", colour, label)
        axes.plot(places, [row["ideal"] for row in curve], color=colour, **_IDEAL)
    axes.set_title("speed-up of prefill", loc="left", fontsize=9)
    axes.set_xlabel("pruning ratio", fontsize=9)
    _label_ratios(axes, ours)


def _draw_clients(axes: Axes, rows: Sequence[Row]) -> None:
    for clients, colour in zip(
        dict.fromkeys(row["clients"] for row in rows), _COLOURS, strict=False
    ):
        curve = [row for row in rows if row["clients"] == clients and row["ratio"] != MIXED]
        places = [_place(row["ratio"]) for row in curve]
        _points(axes, places, curve, "throughput", colour, f"{clients} clients")
        axes.plot(places, [row["ideal"] for row in curve], color=colour, **_IDEAL)
    axes.set_title("requests a second", loc="left", fontsize=9)
    axes.set_xlabel("pruning ratio", fontsize=9)
    _label_ratios(axes, [row for row in rows if row["ratio"] != MIXED])


def _draw_load(axes: Axes, rows: Sequence[Row]) -> None:
    places = [math.log2(row["rate"]) for row in rows]
    _points(axes, places, rows, "throughput", _COLOURS[0], "ratios of mean 8/9")
    axes.plot(places, [row["ideal"] for row in rows], color=_COLOURS[0], **_IDEAL)
    axes.set_xticks(places, [f"{row['rate']:g}" for row in rows])
    axes.set_title("requests a second, open load", loc="left", fontsize=9)
    axes.set_xlabel("arrivals over what stock serves", fontsize=9)


def _points(
    axes: Axes,
    places: Sequence[float],
    rows: Sequence[Row],
    figure: str,
    colour: str,
    label: str,
) -> None:
    medians = [row[figure] for row in rows]
    spreads = [row[f"{figure}_spread"] for row in rows]
    below = [middle - low for middle, (low, _) in zip(medians, spreads, strict=True)]
    above = [high - middle for middle, (_, high) in zip(medians, spreads, strict=True)]
    axes.errorbar(
        places,
        medians,
        yerr=[below, above],
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
        label=label,
    )


def _place(ratio: str) -> float:
    # Logarithmic in the share of tokens kept, as the plot of accuracy is.
    return -math.log2(1 - float(Fraction(ratio)))


def _label_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    ratios = dict.fromkeys(row["ratio"] for row in rows)
    axes.set_xticks([_place(ratio) for ratio in ratios], list(ratios))
