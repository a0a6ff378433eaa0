"""Results in rows: bars, dots of several seeds, and what is done when."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
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
    legend_above,
    subplots,
)
from mamba_tutorial.plotting.ticks import logarithmic, written

ROW = 0.2  # inches: a bar beside a line of type


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str,
    mark: float | None = None,
    unit: str = "",
) -> Figure:
    """Draw labelled bars, lying, in groups; a value that is NaN leaves its place empty.

    The name of a group stands beside its bar, or above its bars if they are several. The values
    stand in a column at the right, all with the same number of decimals.

    Args:
        groups: for each group its name and its bars, {name: {label: value}}; equal labels share a
            colour.
        xlabel: label of the axis.
        mark: where to draw a dashed line.
        unit: written behind each value.
    """
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    colors = dict(zip(labels, [BLUE, ORANGE, TEAL, PLUM, GREY, INK] * 3, strict=False))
    single = max(map(len, groups.values())) == 1
    places, names, y = [], {}, 0.0
    for name, group in groups.items():
        names[name] = y
        y += 0 if single else 1.05
        places += [(y + i, label, value) for i, (label, value) in enumerate(group.items())]
        y += len(group) + (0.3 if single else 0.5)
    legend = 0.25 * -(-len(labels) // 2) if len(labels) > 1 else 0
    figure, (ax,) = subplots(ROW * y + 0.6 + legend)
    for label in labels:
        mine = [(at, value) for at, other, value in places if other == label]
        ax.barh(*zip(*mine, strict=True), height=0.86, color=colors[label], label=label)
    if mark is not None:
        ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
    _write_values(ax, [(at, value) for at, _, value in places], unit)
    _name_groups(ax, names, single)
    ax.set(xlabel=xlabel, ylim=(y - 0.7, -0.7))
    ax.margins(x=0.02)
    if len(labels) > 1:
        legend_above(figure, ax)
    return figure


def _write_values(ax: Axes, values: list[tuple[float, float]], unit: str):
    """Write the values of all bars in one column, so that no bar or line is crossed."""
    largest = np.nanmax([value for _, value in values])
    whole = all(np.isnan(value) or value == round(value) for _, value in values)
    decimals = 0 if whole or largest >= 100 else 1 if largest >= 10 else 2
    for at, value in values:
        if not np.isnan(value):
            place = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "center"}
            ax.text(1.13, at, f"{value:.{decimals}f}{unit}", **place)


def _name_groups(ax: Axes, names: Mapping[str, float], beside: bool):
    if beside:
        ax.set_yticks(list(names.values()), list(names))
        ax.tick_params(axis="y", length=0)
        return
    ax.set_yticks([])
    for name, at in names.items():
        ax.text(0.01, at, name, transform=ax.get_yaxis_transform(), weight="bold", va="center")


def spread(
    panels: Panels,
    *,
    xlabel: str,
    log: bool = False,
    marks: Mapping[str, float] | None = None,
    best: float | None = None,
) -> Figure:
    """Draw the results of several seeds: a dot for each and a bar at their mean, row by row.

    Panels with the same rows stand side by side, others one above the other, on one x axis.

    Args:
        panels: for each panel its title and its rows, {title: {label: results}}.
        xlabel: label of the x axes.
        log: make the x axes logarithmic where results differ by more than a factor of ten.
        marks: for a panel's title, where to draw a dashed line.
        best: a value that no result reaches; the axis is stretched towards it (logarithmic in what
            is missing), so that a few bad results do not push the good ones together.
    """
    figure, axes = _panels_of_rows([list(groups) for groups in panels.values()])
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for row, results in enumerate(groups.values()):
            results = np.asarray(results, dtype=float)
            results = results if best is None else best - results
            ax.plot(results, np.full(len(results), row), "o", color=BLUE, ms=5, alpha=0.6)
            ax.plot(results.mean(), row, "|", color=ORANGE, ms=15, mew=2.4)
        if marks and title in marks:
            ax.axvline(marks[title], color=INK, linestyle="--", linewidth=1)
        ax.set(title=title, yticks=range(len(groups)), yticklabels=list(groups))
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel(xlabel)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", color=PALE, linewidth=0.8)
        ax.set_axisbelow(True)
        values = np.concatenate([np.asarray(results) for results in groups.values()])
        if best is not None:
            logarithmic(ax.xaxis)
            ax.set_xticks(ticks := ax.get_xticks(), written([best - tick for tick in ticks]))
            if not ax.xaxis_inverted():  # by another panel, on the axis that they share
                ax.invert_xaxis()
        elif log and values.max() > 10 * values.min():
            logarithmic(ax.xaxis, 4)
        else:
            ax.locator_params(axis="x", nbins=4 if len(panels) > 1 else 6)
    return figure


def _panels_of_rows(rows: list[list[str]]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel for each list of rows, and its panels."""
    if all(labels == rows[0] for labels in rows):
        height = 0.27 * len(rows[0]) + 0.9
        return subplots(height, columns=len(rows), sharey=len(rows) > 1)
    sizes = [len(labels) for labels in rows]
    height = 0.27 * sum(sizes) + 0.35 * len(rows) + 0.6
    return subplots(height, rows=len(rows), sharex=True, height_ratios=sizes)


def schedule(steps: Sequence[tuple[float, float, str]], *, xlabel: str) -> Figure:
    """Draw what is done when: one bar for each step, in their order from above.

    Args:
        steps: where each begins and ends, and what it is; equal kinds share a colour.
        xlabel: label of the x axis.
    """
    kinds = list(dict.fromkeys(kind for *_, kind in steps))
    figure, (ax,) = subplots(0.085 * len(steps) + 1.6)
    for kind, color in zip(kinds, [BLUE, ORANGE, TEAL, PLUM], strict=False):
        mine = [(row, *step[:2]) for row, step in enumerate(steps) if step[2] == kind]
        rows, begins, ends = np.array(mine).T
        widths, lefts = np.abs(ends - begins), np.minimum(begins, ends)
        ax.barh(rows, widths, left=lefts, height=0.8, color=color, label=kind)
    ax.set(xlabel=xlabel, ylabel="one after the other", yticks=[])
    ax.invert_yaxis()
    ax.margins(x=0)
    legend_above(figure, ax)
    return figure
