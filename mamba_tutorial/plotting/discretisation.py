"""The pictures of chapter 2: samples, steps, errors, and a step that is learned."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    TEAL,
    WIDTH,
    Panels,
    legend_above,
    legend_below,
    subplots,
)
from mamba_tutorial.plotting.ticks import logarithmic


def staircase(
    t: ArrayLike, signal: ArrayLike, sample_times: ArrayLike, samples: ArrayLike
) -> Figure:
    """Draw a signal, its samples, and the staircase that holds each sample until the next."""
    figure, axes = subplots(4.2, rows=3, sharex=True)
    titles = ["a signal", "is sampled", "and held"]
    for ax, title in zip(axes, titles, strict=True):
        ax.plot(t, signal, color=GREY, ls="-", lw=1, alpha=1 if title == "a signal" else 0.5)
        ax.set_title(title)
        ax.locator_params(axis="y", nbins=3)
    axes[1].plot(sample_times, samples, "o", color=BLUE, ms=4)
    step = np.asarray(sample_times)[1] - np.asarray(sample_times)[0]
    held_times = np.append(sample_times, np.asarray(sample_times)[-1] + step)
    axes[2].plot(
        held_times, np.append(samples, np.asarray(samples)[-1]), drawstyle="steps-post", color=BLUE
    )
    axes[2].plot(sample_times, samples, "o", color=BLUE, ms=4)
    axes[2].set_xlabel("time (s)")
    return figure


def one_step(
    t: ArrayLike, exact: ArrayLike, dt: float, steps: Mapping[str, float], start: float
) -> Figure:
    """Draw the exact path over one step, and where each rule's straight line lands."""
    figure, (ax,) = subplots(3.0)
    ax.plot(t, exact, color=INK, ls="-", lw=2.2, label="exact (zero-order hold)")
    markers = {"forward Euler": "s", "bilinear": "D"}
    for (label, end), color in zip(steps.items(), [ORANGE, TEAL], strict=False):
        ax.plot([0, dt], [start, end], color=color, marker=markers[label], label=label)
    ax.axvline(dt, color=GREY, lw=0.8, ls=":")
    ax.set(xlabel="time", ylabel="state h", xticks=[0, dt], xticklabels=["0", "Δ"])
    ax.locator_params(axis="y", nbins=5)
    legend_above(figure, ax)
    return figure


def convergence(dt: ArrayLike, panels: Panels, exact: float = 1e-12) -> Figure:
    """Draw errors over the step on logarithmic axes, with the slopes for small steps.

    Errors below `exact` are rounding: they are named in the legend, and not drawn.
    """
    figure, axes = subplots(3.6, columns=len(panels), sharey=True)
    for ax, (title, errors) in zip(axes, panels.items(), strict=True):
        for (label, error), marker in zip(errors.items(), ["o", "s", "D", "^"], strict=False):
            slope = np.polyfit(np.log(dt[-3:]), np.log(error[-3:]), 1)[0]
            rounding = max(error) < exact
            text = f"{label}: exact" if rounding else f"{label}: slope {slope:.1f}"
            drawn = np.full(len(dt), np.nan) if rounding else error
            ax.loglog(dt, drawn, marker=marker, ms=4, label=text)
        ax.set(title=title, xlabel="step Δ (s)")
        ax.set_xticks(dt[::2], [f"{step:.3g}" for step in dt[::2]])
        ax.xaxis.set_minor_locator(NullLocator())
        legend_below(ax, width=WIDTH / len(panels) - 0.6)
    logarithmic(axes[0].yaxis)
    axes[0].set_ylabel("largest error")
    return figure


def stability_regions(
    growth: Mapping[str, Callable[[np.ndarray], np.ndarray]], limit: float = 4.0
) -> Figure:
    """Shade where |R(z)| < 1, for each rule's growth factor R of a step z = Δ λ."""
    figure, axes = subplots(2.7, columns=len(growth), sharey=True)
    # an even number of rows, so that none lies on the real axis, where a rule may divide by zero
    re, im = np.meshgrid(np.linspace(-limit, limit / 2, 151), np.linspace(-0.8, 0.8, 160) * limit)
    for ax, (title, factor) in zip(axes, growth.items(), strict=True):
        size = np.abs(factor(re + 1j * im))
        ax.contourf(re, im, size, levels=[0, 1], colors=[PALE])
        ax.contour(re, im, size, levels=[1], colors=[BLUE], linewidths=1.6)
        ax.contour(re, im, size, levels=[0.25, 0.5, 0.75], colors=[INK], linewidths=0.6)
        ax.axvline(0, color=INK, lw=0.7)
        ax.axhline(0, color=INK, lw=0.7)
        ax.set(title=title, xlabel="Re Δλ", xticks=[-4, -2, 0], yticks=[-2, 0, 2])
        ax.set_aspect("equal")
    axes[0].set_ylabel("Im Δλ")
    return figure


def descent(
    grid: ArrayLike, loss: ArrayLike, paths: Mapping[str, tuple[ArrayLike, ArrayLike]], true: float
) -> Figure:
    """Draw a loss over Δ with the places that descents passed, and Δ over their iterations."""
    figure, (left, right) = subplots(3.2, columns=2)
    left.loglog(grid, loss, color=GREY, ls="-", lw=1.2)
    for (label, (dt, losses)), marker in zip(paths.items(), ["o", "s", "D"], strict=False):
        (line,) = left.plot(dt, losses, marker=marker, ms=3, ls="none")
        right.semilogy(dt, label=label, color=line.get_color())
    left.axvline(true, color=INK, lw=0.8, ls=":")
    right.axhline(true, color=INK, lw=0.8, ls=":")
    left.set(xlabel="Δ (s)", ylabel="loss", title="where the descents pass")
    right.set(xlabel="iteration", ylabel="Δ (s)", title="how they get there")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        logarithmic(axis, 4)
    legend_above(figure, right)
    return figure
