"""The pictures of chapter 1: states, modes and flows."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    TEAL,
    legend_above,
    subplots,
)


def maze(
    walls: Sequence[str],
    paths: Mapping[str, Sequence[tuple[int, int]]],
    future: Sequence[tuple[int, int]],
) -> Figure:
    """Draw walks through a maze that meet in one cell, and the one walk that both take from there.

    Args:
        walls: rows of "#" (wall) and "." (floor).
        paths: the labelled walks, as cells (row, column); all end where `future` begins.
        future: the cells from there on.
    """
    rows, columns = len(walls), len(walls[0])
    figure, (ax,) = subplots(3.5)
    for r, row in enumerate(walls):
        for c, cell in enumerate(row):
            if cell == "#":
                ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, color=PALE, ec=GREY, lw=0.4))
    for (label, cells), shift in zip(paths.items(), (-0.12, 0.12), strict=False):
        r, c = np.array(cells).T + shift
        (line,) = ax.plot(c, r, label=label, lw=2.4)
        ax.plot(c[0], r[0], "o", color=line.get_color(), ms=9)
    r, c = np.array(future).T
    ax.plot(c, r, label="both, from there on", lw=2.4)
    ax.plot(c[-1], r[-1], "s", color=TEAL, ms=9)
    ax.add_patch(Rectangle((c[0] - 0.5, r[0] - 0.5), 1, 1, fill=False, ec=INK, lw=2))
    ax.annotate(
        "the same state",
        (c[0], r[0] + 0.5),
        (c[0], rows - 0.1),
        ha="center",
        va="top",
        arrowprops={"arrowstyle": "-", "color": INK},
    )
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows + 0.35, -0.5), aspect="equal")
    ax.axis("off")
    legend_above(figure, ax)
    return figure


def crossing(t: ArrayLike, runs: Mapping[str, ArrayLike], at: tuple[float, float]) -> Figure:
    """Draw curves that meet in one marked point (time, position) and then part."""
    figure, (ax,) = subplots(3.0)
    for label, run in runs.items():
        ax.plot(t, run, label=label)
    ax.plot(*at, "o", color=INK, ms=7, zorder=3)
    ax.axvline(at[0], color=GREY, lw=0.8, ls=":")
    ax.annotate("same position,\nother velocity", at, (12, 22), textcoords="offset points")
    ax.set(xlabel="time (s)", ylabel="position (m)")
    ax.margins(x=0)
    legend_above(figure, ax)
    return figure


def kicks(t: ArrayLike, responses: ArrayLike, total: ArrayLike) -> Figure:
    """Draw the fading responses (kicks, length) of a state to single kicks, and their sum."""
    figure, (ax,) = subplots(3.0)
    responses = np.asarray(responses)
    ax.fill_between(t, np.sum(responses, axis=0), color=PALE)
    for i, response in enumerate(responses):
        label = "one kick each, fading" if i == 0 else None
        ax.plot(t, response, color=ORANGE, ls="--", lw=1.2, label=label)
    ax.plot(t, total, color=BLUE, ls="-", label="the state: their sum")
    ax.set(xlabel="time (s)", ylabel="state h")
    ax.margins(x=0)
    ax.locator_params(axis="y", nbins=5)
    legend_above(figure, ax)
    return figure


def modes(
    rates: Sequence[float], frequencies: Sequence[float], mode: Callable[[complex], ArrayLike]
) -> Figure:
    """Draw Re e^{λt} as a small picture at the place of each λ in the complex plane."""
    figure, (ax,) = subplots(3.7)
    width = 0.8 * min(np.diff(sorted(rates)))
    height = 0.62 * min(np.diff(sorted(frequencies)))
    ax.axvspan(min(rates) - width, 0, color=PALE, zorder=0)
    ax.axvline(0, color=GREY, lw=1)
    ax.axhline(0, color=GREY, lw=1)
    for rate in rates:
        for frequency in frequencies:
            response = np.asarray(mode(complex(rate, frequency)))
            x = rate + width * (np.linspace(0, 1, len(response)) - 0.5)
            color = BLUE if rate < 0 else (TEAL if rate == 0 else ORANGE)
            shown = response / np.abs(response).max()
            ax.plot(x, frequency + height / 2 * shown, color=color, ls="-", lw=1.3)
            ax.plot(rate, frequency, ".", color=INK, ms=3)
    ax.set(xlabel="Re λ (how fast it grows or fades)")
    ax.set(ylabel="Im λ (how fast it turns)")
    ax.set(xlim=(min(rates) - width, max(rates) + width))
    ax.set(xticks=rates, yticks=frequencies)
    for x, text in [(min(rates) / 2, "stable: fades"), (max(rates) / 2, "unstable: grows")]:
        ax.text(x, 1.02, text, transform=ax.get_xaxis_transform(), ha="center")
    return figure


def phase_planes(
    systems: Mapping[str, ArrayLike], trajectories: Mapping[str, ArrayLike], limit: float = 1.6
) -> Figure:
    """Draw the flow h' = A h of 2 × 2 systems, and trajectories (runs, length, 2) through it."""
    rows = -(-len(systems) // 2)
    figure, axes = subplots(2.6 * rows + 0.1, rows, 2, sharex=True, sharey=True)
    grid = np.linspace(-limit, limit, 9)
    p, v = np.meshgrid(grid, grid)
    for ax, (title, A) in zip(axes, systems.items(), strict=False):
        dp, dv = np.einsum("ij,jkl->ikl", np.asarray(A), np.stack([p, v]))
        length = np.hypot(dp, dv) + 1e-9
        ax.quiver(p, v, dp / length, dv / length, color=GREY, alpha=0.55, scale=22, width=0.006)
        for run, color in zip(np.asarray(trajectories[title]), [BLUE, ORANGE], strict=False):
            ax.plot(run[:, 0], run[:, 1], color=color, ls="-", lw=1.4)
            ax.plot(*run[0], "o", color=color, ms=4)
        ax.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for ax in axes[len(systems) :]:
        ax.remove()
    figure.supxlabel("position", fontsize="medium")
    figure.supylabel("velocity", fontsize="medium")
    return figure
