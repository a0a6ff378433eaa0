"""Curves and points over an axis."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import INK, Panels, legend_below, subplots


def time_series(
    t: ArrayLike, panels: Panels, *, xlabel: str = "time (s)", height: float = 1.7, held=()
) -> Figure:
    """Draw panels of labelled signals over one time axis, one panel below the other.

    Args:
        t: (length,), the times of the samples.
        panels: for each panel its y label and its signals, {ylabel: {label: (length,)}}.
        xlabel: label of the time axis.
        height: height of a panel in inches.
        held: labels of the signals to draw as staircases, each sample kept until the next.
    """
    figure, axes = subplots(height * len(panels) + 0.4, rows=len(panels), sharex=True)
    labelled = None  # a legend stands above the first panel that it is for
    for ax, (ylabel, signals) in zip(axes, panels.items(), strict=True):
        for label, signal in signals.items():
            style = "steps-post" if label in held else "default"
            ax.plot(t, np.asarray(signal), label=label, drawstyle=style)
        ax.set_ylabel(ylabel)
        ax.margins(x=0)
        if len(signals) > 1 and list(signals) != labelled:
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.96), ncols=len(signals))
            labelled = list(signals)
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
    height: float = 3.1,
) -> Figure:
    """Draw panels of labelled curves side by side.

    Args:
        x: the common x values; a curve with fewer values ends early.
        panels: for each panel its title and its curves, {title: {label: values}}.
        xlabel: label of the x axes.
        ylabel: label of the first y axis.
        log: the axes that are logarithmic, "x", "y" or "xy".
        markers: mark each value.
        mark: where on the x axes to draw a dashed line.
        height: height of the picture in inches.
    """
    figure, axes = subplots(height, columns=len(panels))
    x = np.asarray(x)
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for (label, values), marker in zip(lines.items(), "osD^" * 3, strict=False):
            values = np.asarray(values)
            ax.plot(x[: len(values)], values, label=label, marker=marker if markers else "", ms=4)
        ax.set(title=title, xlabel=xlabel)
        if mark is not None:
            ax.axvline(mark, color=INK, linestyle="--", linewidth=1)
        if "x" in log:
            ax.set_xscale("log")
        if "y" in log:
            ax.set_yscale("log")
        if 1 < len(lines) < 4:
            ax.legend()
        elif len(lines) > 3:
            columns = 2 if len(panels) > 1 else 4 if len(lines) == 4 else 3
            legend_below(ax, columns)
    axes[0].set_ylabel(ylabel)
    return figure


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
        ax.set(title=title, xlabel=xlabel, xscale="log", yscale="log")
        ticks = [tick for tick in (0.5, 1, 2, 3, 4, 6) if tick > ax.get_ylim()[0]]
        ax.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        ax.minorticks_off()
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(ylabel)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    return figure
