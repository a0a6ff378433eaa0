"""Curves and points over an axis."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import (
    INK,
    WIDTH,
    Panels,
    legend_above,
    legend_below,
    subplots,
)
from mamba_tutorial.plotting.ticks import logarithmic


def time_series(
    t: ArrayLike, panels: Panels, *, xlabel: str = "time (s)", height: float = 1.5, held=()
) -> Figure:
    """Draw panels of labelled signals over one time axis, one panel below the other.

    Args:
        t: (length,), the times of the samples.
        panels: for each panel its name and its signals, {name: {label: (length,)}}.
        xlabel: label of the time axis.
        height: height of a panel in inches.
        held: labels of the signals to draw as staircases, each sample kept until the next.
    """
    figure, axes = subplots(height * len(panels) + 0.4, rows=len(panels), sharex=True)
    for ax, (name, signals) in zip(axes, panels.items(), strict=True):
        for label, signal in signals.items():
            style = "steps-post" if label in held else "default"
            ax.plot(t, np.asarray(signal), label=label, drawstyle=style)
        ax.set_title(name)
        ax.margins(x=0)
        ax.locator_params(axis="y", nbins=4)
    legends = [list(signals) for signals in panels.values()]
    for i, (ax, labels) in enumerate(zip(axes, legends, strict=True)):
        if len(labels) > 1 and labels not in legends[:i]:  # it serves those below, too
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels))
    axes[-1].set_xlabel(xlabel)
    return figure


def curves(
    x: ArrayLike,
    panels: Panels,
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    markers: bool = False,
    mark: float | None = None,
    height: float = 3.0,
    unit: str = "",
    stacked: bool = False,
) -> Figure:
    """Draw panels of labelled curves, side by side or one below the other.

    Args:
        x: the common x values; a curve with fewer values ends early.
        panels: for each panel its title and its curves, {title: {label: values}}.
        xlabel: label of the x axes.
        ylabel: label of the first y axis.
        log: the axes that are logarithmic, "x", "y" or "xy".
        markers: mark each value.
        mark: where on the x axes to draw a dashed line.
        height: height of the picture in inches.
        unit: of the y values, where they are logarithmic: "s" writes µs, ms and s.
        stacked: put the panels one below the other.
    """
    shape = {"rows": len(panels), "sharex": True} if stacked else {"columns": len(panels)}
    figure, axes = subplots(height, **shape)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        _draw(ax, np.asarray(x), lines, markers)
        ax.set_title(title)
        if mark is not None:
            ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
        _scale(ax, log, unit, few=len(panels) > 1)
    for ax in axes[-1:] if stacked else axes:
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    _legends(figure, axes, [list(lines) for lines in panels.values()], stacked)
    return figure


def _draw(ax: Axes, x: np.ndarray, lines: Mapping[str, ArrayLike], markers: bool):
    for (label, values), marker in zip(lines.items(), "osD^" * 3, strict=False):
        values = np.asarray(values)
        ax.plot(x[: len(values)], values, label=label, marker=marker if markers else "", ms=4)


def _scale(ax: Axes, log: str, unit: str, few: bool):
    """Set scales and ticks: few of them where panels share the width."""
    if "x" in log:
        logarithmic(ax.xaxis, 4 if few else 6)
    else:
        ax.locator_params(axis="x", nbins=4 if few else 7)
    if "y" in log:
        logarithmic(ax.yaxis, 6, unit)
    else:
        ax.locator_params(axis="y", nbins=5)


def _legends(figure: Figure, axes: list[Axes], labels: list[list[str]], stacked: bool):
    """Put legends where they cover no curve: one for all panels if it holds for all of them."""
    if all(each == labels[0] for each in labels):
        if len(labels[0]) > 1:
            legend_above(figure, axes[0])
        return
    for ax, each in zip(axes, labels, strict=True):
        if len(each) > 1 and stacked:
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(each))
        elif len(each) > 1:
            legend_below(ax, width=WIDTH / len(axes) - 0.6)


def points(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    *,
    xlabel: str,
    ylabel: str,
    mark: float,
    height: float = 3.3,
) -> Figure:
    """Draw panels of labelled points side by side, both axes logarithmic, the y axis shared.

    Args:
        panels: for each panel its title and its points, {title: {label: (x, y)}}.
        xlabel: label of the x axes.
        ylabel: label of the first y axis.
        mark: where on the y axes to draw a dashed line.
        height: height of the picture in inches.
    """
    figure, axes = subplots(height, columns=len(panels), sharey=True)
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for (label, (x, y)), marker in zip(groups.items(), "osD^v" * 3, strict=False):
            ax.plot(x, y, marker, label=label, ms=5, alpha=0.85)
        ax.axhline(mark, color=INK, linestyle="--", linewidth=1)
        ax.set(title=title, xlabel=xlabel, yscale="log")
        logarithmic(ax.xaxis, 4)
        ticks = [tick for tick in (0.5, 1, 2, 3, 4, 6) if tick > ax.get_ylim()[0]]
        ax.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel(ylabel)
    legend_above(figure, axes[0])
    return figure
