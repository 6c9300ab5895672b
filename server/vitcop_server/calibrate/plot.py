"""Draws agreement over the ratio. Needs matplotlib, which the server does not."""

from collections.abc import Sequence
from pathlib import Path

from vitcop_server.calibrate.groups import ALL, Goal, Result


def plot_agreement(results: Sequence[Result], goal: Goal, path: Path) -> None:
    """Write a PNG with a panel for each measure: a line for all images, thin ones for groups.

    The band below the line of all images reaches to its bound.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(result.measure for result in results))
    figure = Figure(figsize=(5.0 * len(measures), 3.8), layout="constrained", facecolor="white")
    every = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axes, measure in zip(every, measures, strict=True):
        drawn = [one for one in results if one.measure == measure]
        for number, result in reversed(list(enumerate(drawn))):
            group = result.group
            is_total = group == results[0].group
            ratios = list(result.curve)
            shares = [100 * agreement.share for agreement in result.curve.values()]
            label = " / ".join(name for name in (group.kind, group.use) if name != ALL)
            axes.plot(
                ratios,
                shares,
                marker="o",
                ms=3,
                color="black" if is_total else f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                lw=2.0 if is_total else 0.8,
                label=f"all {group.num_images} images" if is_total else label,
                zorder=3 if is_total else 2,
            )
            if is_total:
                bounds = [100 * goal.bound(agreement) for agreement in result.curve.values()]
                axes.fill_between(ratios, bounds, shares, color="black", alpha=0.1, linewidth=0)
        axes.axhline(100 * goal.keep, color="#D55E00", linewidth=0.8, linestyle="--")
        axes.set_title(measure, loc="left", fontsize=10)
        axes.set_xlabel("pruning ratio")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("images that agree with ratio 0 / %")
    every[-1].legend(
        frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True
    )
    figure.savefig(path, format="png", dpi=150)
