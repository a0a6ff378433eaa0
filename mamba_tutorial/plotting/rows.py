"""Results in rows: bars, dots of several seeds, and what is done when."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mamba_tutorial.plotting.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    PLUM,
    TEAL,
    Panels,
    legend_below,
    subplots,
)


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str,
    mark: float | None = None,
    unit: str = "",
    height: float | None = None,
) -> Figure:
    """Draw labelled bars, lying, in groups; a value that is NaN leaves its place empty.

    Args:
        groups: for each group its name and its bars, {name: {label: value}}; equal labels share a
            colour.
        xlabel: label of the axis.
        mark: where to draw a dashed line.
        unit: written behind each value.
        height: height of the picture in inches; by default what the bars need.
    """
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    colors = dict(zip(labels, [BLUE, ORANGE, TEAL, PLUM, GREY, INK] * 3, strict=False))
    places, ticks, y = [], {}, 0.0
    for name, group in groups.items():
        ticks[name] = y + (len(group) - 1) / 2
        places += [(y + i, label, value) for i, (label, value) in enumerate(group.items())]
        y += len(group) + 0.7
    figure, (ax,) = subplots(height or 0.21 * y + 0.9)
    for label in labels:
        mine = [(at, value) for at, other, value in places if other == label]
        at, values = zip(*mine, strict=True)
        drawn = ax.barh(at, values, height=0.86, color=colors[label], label=label)
        texts = ["" if np.isnan(value) else f"{value:.3g}{unit}" for value in values]
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of the dashed line
        ax.bar_label(drawn, texts, padding=3, fontsize=8.5, bbox=clear)
    if mark is not None:
        ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
    ax.set(xlabel=xlabel, yticks=list(ticks.values()), yticklabels=list(ticks))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.1)
    if len(labels) > 1:
        columns = len(labels) if len(labels) < 5 else 3
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns)
    return figure


def spread(
    panels: Panels, *, xlabel: str, log: bool = False, marks: Mapping[str, float] | None = None
) -> Figure:
    """Draw the results of several seeds: a dot for each and a bar at their mean, row by row.

    Args:
        panels: for each panel its title and its rows, {title: {label: results}}.
        xlabel: label of the x axes.
        log: make the x axes logarithmic where results differ by more than a factor of ten.
        marks: for a panel's title, where to draw a dashed line.
    """
    rows = max(map(len, panels.values()))
    figure, axes = subplots(0.24 * rows + 0.9, columns=len(panels), sharey=len(panels) > 1)
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for row, results in enumerate(groups.values()):
            results = np.asarray(results, dtype=float)
            ax.plot(results, np.full(len(results), row), "o", color=BLUE, ms=4.5, alpha=0.6)
            ax.plot(results.mean(), row, "|", color=ORANGE, ms=14, mew=2.2)
        if marks and title in marks:
            ax.axvline(marks[title], color=INK, linestyle="--", linewidth=1)
        ax.set(title=title, xlabel=xlabel, yticks=range(len(groups)), yticklabels=list(groups))
        ax.set_ylim(rows - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", color=PALE, linewidth=0.8)
        ax.set_axisbelow(True)
        values = np.concatenate([np.asarray(results) for results in groups.values()])
        if log and values.max() > 10 * values.min():
            ax.set_xscale("log")
    return figure


def schedule(steps: Sequence[tuple[float, float, str]], *, xlabel: str) -> Figure:
    """Draw what is done when: one bar for each step, in their order from above.

    Args:
        steps: where each begins and ends, and what it is; equal kinds share a colour.
        xlabel: label of the x axis.
    """
    kinds = list(dict.fromkeys(kind for *_, kind in steps))
    figure, (ax,) = subplots(0.11 * len(steps) + 1.4)
    for kind, color in zip(kinds, [BLUE, ORANGE, TEAL, PLUM], strict=False):
        mine = [(row, *step[:2]) for row, step in enumerate(steps) if step[2] == kind]
        rows, begins, ends = np.array(mine).T
        widths, lefts = np.abs(ends - begins), np.minimum(begins, ends)
        ax.barh(rows, widths, left=lefts, height=0.8, color=color, label=kind)
    ax.set(xlabel=xlabel, ylabel="one after the other", yticks=[])
    ax.invert_yaxis()
    ax.margins(x=0)
    legend_below(ax, columns=2)
    return figure
