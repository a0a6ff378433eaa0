"""The pictures of chapter 11: a chip, its warps, and what each thread holds."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.drawing import arrow
from mamba_tutorial.plotting.style import BLUE, GREY, INK, ORANGE, PALE, PLUM, TEAL, WIDTH, subplots


def memories(levels: Sequence[tuple[str, str, str]]) -> Figure:
    """Draw a chip's memories as boxes that grow as they get slower.

    Args:
        levels: from the nearest to the farthest, each its name, its size and its speed.
    """
    figure, (ax,) = subplots(0.55 * len(levels) + 0.1)
    colors = [ORANGE, TEAL, BLUE, GREY, PLUM]
    for row, ((name, size, speed), color) in enumerate(zip(levels, colors, strict=False)):
        width, y = 1.2 + 0.8 * row, len(levels) - row
        box = Rectangle(
            (2.4 - width / 2, y), width, 0.62, facecolor=color, alpha=0.35, edgecolor=INK
        )
        ax.add_patch(box)
        ax.text(2.4, y + 0.31, size, ha="center", va="center")
        ax.text(0.5, y + 0.31, name, ha="right", va="center")
        ax.text(4.35, y + 0.31, speed, ha="left", va="center")
        if row:
            arrow(ax, (2.4, y + 0.64), (2.4, y + 0.98))
    ax.set(xlim=(-1.6, 9.3), ylim=(0.9, len(levels) + 0.7))
    ax.axis("off")
    return figure


def timelines(panels: Mapping[str, ArrayLike]) -> Figure:
    """Draw what warps do in each clock, (warps, clocks): 1 where one issues, 0 where it waits."""
    rows = [np.asarray(panel) for panel in panels.values()]
    figure = plt.figure(
        figsize=(WIDTH, 0.19 * sum(len(r) + 1.5 for r in rows) + 0.35 * len(rows) + 0.4)
    )
    plt.close(figure)
    axes = figure.subplots(len(rows), 1, height_ratios=[len(r) + 1 for r in rows], sharex=True)
    colors = LinearSegmentedColormap.from_list("busy", [PALE, BLUE])
    for ax, (title, warps) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        busy = np.asarray(warps).max(axis=0, keepdims=True)
        picture = np.concatenate([np.asarray(warps), 0 * busy, busy])
        ax.imshow(picture, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        ax.axhspan(len(warps) - 0.5, len(warps) + 0.5, color="white")
        names = [f"warp {k}" for k in range(len(warps))]
        ax.set_yticks([*range(len(warps)), len(warps) + 1], [*names, "scheduler"])
        ax.set_title(f"{title}: busy {100 * busy.mean():.0f} % of the time")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    ax.set_xlabel("clocks")
    return figure


def register_tile() -> Figure:
    """Draw how a tile of the fused scan lies in a warp: 32 threads, each with its registers."""
    figure, (ax,) = subplots(3.3)
    tokens, states = 8, 16
    for lane in range(12):
        color = ORANGE if lane == 2 else PALE
        ax.add_patch(
            Rectangle((lane * 0.42, 0), 0.36, 3.2, facecolor=color, edgecolor=GREY, lw=0.8)
        )
    ax.text(12 * 0.42 + 0.15, 1.6, "… 32", va="center")
    ax.text(2.4, 3.5, "a warp: one channel for each thread", ha="center")
    ax.text(1.02, -0.32, "this one", ha="center")
    left, width, height = 7.0, 0.19, 0.4
    for t in range(tokens):
        for n in range(states):
            corner = (left + n * width, 3.2 - (t + 1) * height)
            ax.add_patch(
                Rectangle(corner, width, height, facecolor="white", edgecolor=GREY, lw=0.6)
            )
    ax.add_patch(
        Rectangle((left, 3.2 - height), states * width, height, facecolor=ORANGE, alpha=0.35)
    )
    ax.text(left + states * width / 2, 3.5, "its registers: 16 states", ha="center")
    ax.text(left - 0.15, 1.6, "8 tokens", ha="right", va="center", rotation=90)
    arrow(ax, (left + states * width + 0.25, 3.1), (left + states * width + 0.25, 0.1))
    ax.text(left + states * width + 0.4, 1.6, "the scan", va="center", rotation=-90)
    ax.set(xlim=(-0.2, 11.2), ylim=(-0.6, 3.9))
    ax.axis("off")
    return figure


def works_on(panels: Mapping[str, tuple[int, int, int, int]]) -> Figure:
    """Draw what a program of the selective scan computes at a time, of all tokens and channels.

    A square is a token of a channel, and its sixteen parts are the states.

    Args:
        panels: for each title how many tokens, channels and states are computed at once, and how
            many tokens more are on their way from memory.
    """
    tokens, channels, side = 24, 4, 4
    figure, axes = subplots(1.02 * len(panels) + 0.45, rows=len(panels), sharex=True)
    colors = LinearSegmentedColormap.from_list("work", ["white", BLUE, "#f6c9a0"])
    for ax, (title, (at_once, wide, states, coming)) in zip(axes, panels.items(), strict=True):
        first = 0 if coming else 8  # a token in the middle, or the first tile
        work = np.zeros((channels, side, tokens, side))  # rows of parts, columns of parts
        held = work[:wide, :, first : first + at_once]
        held[...] = np.arange(side * side).reshape(1, side, 1, side) < states
        work[:wide, :, first + at_once : first + at_once + coming] = 2
        ax.imshow(
            work.reshape(channels * side, tokens * side),
            extent=(0, tokens, channels, 0),
            cmap=colors,
            vmin=0,
            vmax=2,
            aspect="auto",
            interpolation="nearest",
        )
        for place in range(tokens + 1):
            ax.axvline(place, color=GREY, lw=0.6)
        for place in range(channels + 1):
            ax.axhline(place, color=GREY, lw=0.6)
        ax.set(title=title, ylabel="channels", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[-1].set_xlabel("tokens")
    return figure


def shared_channels() -> Figure:
    """Draw two warps that share 32 channels: what each holds, and what both take from one place."""
    figure, (ax,) = subplots(3.4)
    lanes, left, width, height = 12, 2.6, 0.42, 1.1
    middle = left + (lanes * width) / 2
    bands = (
        (3.3, "Δ, Δ x", 0.45, BLUE),
        (1.9, "warp 0", height, PALE),
        (0.5, "warp 1", height, PALE),
    )
    for bottom, label, size, color in (*bands, (-0.6, "y", 0.45, BLUE)):
        for lane in range(lanes):
            corner = (left + lane * width, bottom)
            face = ORANGE if lane == 2 and color == PALE else color
            ax.add_patch(
                Rectangle(corner, width - 0.06, size, facecolor=face, edgecolor=GREY, lw=0.8)
            )
        ax.text(left - 0.2, bottom + size / 2, label, ha="right", va="center")
    right = left + lanes * width
    ax.text(right + 0.1, 2.45, "… 32 channels,", va="center")
    ax.text(right + 0.1, 2.05, "states 0 to 7", va="center")
    ax.text(right + 0.1, 1.05, "the same channels,", va="center")
    ax.text(right + 0.1, 0.65, "states 8 to 15", va="center")
    ax.text(right + 0.1, 3.5, "once for both", va="center")
    ax.text(right + 0.1, -0.4, "two halves, added up", va="center")
    arrow(ax, (middle, 3.25), (middle, 3.05))
    arrow(ax, (middle, 0.45), (middle, -0.1))
    ax.set(xlim=(0.6, 11.2), ylim=(-0.8, 4))
    ax.axis("off")
    return figure


def scan_levels() -> Figure:
    """Draw a scan of 16 numbers by four threads: own runs, totals over lanes, corrections."""
    figure, (ax,) = subplots(3.6)
    first, second, third = 4.0, 2.1, 0.3
    labels = {
        "each thread its own run": (first, 1.0),
        "the totals over the lanes": (second, 1.2),
        "what came before": (third, 0.75),
    }
    for label, (y, above) in labels.items():
        ax.text(0, y + above, label, va="center")
        for i in range(16):
            x = i * 0.5 + (i // 4) * 0.4
            end = i % 4 == 3
            color = PALE if y == first else ("white" if y == second and not end else "#dbe7f4")
            if y == third:
                color = "#bcd3ea"
            ax.add_patch(Rectangle((x, y), 0.44, 0.5, facecolor=color, edgecolor=GREY, lw=0.8))
            if y == first and not end:
                arrow(ax, (x + 0.22, y + 0.62), (x + 0.72, y + 0.62))
            if y == third and i >= 4 and not end:
                last = (i // 4) * 2.4 - 0.4 - 0.24
                ax.plot([last, x + 0.22], [second, third + 0.5], color=ORANGE, lw=0.9, ls="-")
    for level, distance in enumerate((1, 2)):
        for thread in range(distance, 4):
            start, stop = (j * 2.4 + 1.72 for j in (thread - distance, thread))
            bow = f"arc3,rad={-0.22 - 0.08 * level}"
            style = {"arrowstyle": "-|>", "mutation_scale": 10, "connectionstyle": bow}
            ends = (start, second + 0.5), (stop, second + 0.5)
            ax.add_patch(FancyArrowPatch(*ends, color=BLUE, lw=1.2, **style))
    ax.set(xlim=(-0.1, 9.4), ylim=(0.2, 5.2))
    ax.axis("off")
    return figure


def look_back() -> Figure:
    """Draw the steps that the 28th tile joins: of tiles, of groups, of groups of groups."""
    tile, group = 27, 4
    figure, (ax,) = subplots(2.4)
    for level, label in enumerate(("tiles", "groups", "groups of groups")):
        width = group**level
        index = tile // width
        first = index - index % group  # of the larger group that the tile is in
        ax.text(-0.6, level + 0.3, label, ha="right", va="center")
        for i in range((tile + 1) // width):
            own, joined = level == 0 and i == tile, first <= i < index
            color = ORANGE if own else BLUE if joined else PALE
            corner, size = (i * width + 0.08, level), (width - 0.16, 0.6)
            ax.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor=GREY, lw=0.8))
    ax.set(xlim=(-8.5, tile + 1.5), ylim=(-0.2, 3))
    ax.axis("off")
    return figure
