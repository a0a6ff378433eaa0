"""Numbers as coloured squares: matrices, images, and what a model does at each token."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import (
    BLUE,
    GREY,
    HEAT,
    SIGNED,
    WIDTH,
    subplots,
)
from mamba_tutorial.plotting.ticks import even, spaced, written


def matrices(panels: Mapping[str, ArrayLike], *, height: float = 3.2, bar: bool = False) -> Figure:
    """Draw matrices side by side, blue below zero and orange above, white at zero.

    Args:
        panels: {title: (rows, columns)}; a colour scale of its own for each.
        height: height of the picture in inches.
        bar: add a colour bar to each.
    """
    figure, axes = subplots(height, columns=len(panels))
    for ax, (title, matrix) in zip(axes, panels.items(), strict=True):
        matrix = np.asarray(matrix)
        top = np.abs(matrix).max()
        image = ax.imshow(matrix, cmap=SIGNED, vmin=-top, vmax=top, interpolation="nearest")
        ax.set_title(title)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if bar:
            step = even(0, top, 2)[-1]  # one number on each side of zero
            below = {"location": "bottom", "shrink": 0.9, "aspect": 30, "pad": 0.03}
            figure.colorbar(image, ax=ax, ticks=[-step, 0, step], **below)
    return figure


def images(panels: Mapping[str, ArrayLike], sequence: ArrayLike, xlabel: str) -> Figure:
    """Draw grey images in a row, and below them the first one as a sequence of numbers."""
    figure = plt.figure(figsize=(WIDTH, 3.0))
    plt.close(figure)
    grid = figure.add_gridspec(2, len(panels), height_ratios=[1, 1.7])
    for column, (title, image) in enumerate(panels.items()):
        ax = figure.add_subplot(grid[0, column])
        ax.imshow(image, cmap="Greys", interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
    ax = figure.add_subplot(grid[1, :])
    ax.step(range(len(sequence)), sequence, where="post", color=BLUE, ls="-")
    ax.set(xlabel=xlabel, ylabel="ink")
    ax.margins(x=0)
    return figure


def token_heat(
    lines: Sequence[tuple[Sequence[str], ArrayLike]], *, label: str, span: tuple[float, float]
) -> Figure:
    """Draw lines of tokens under heat maps of a quantity that each token has in several channels.

    Args:
        lines: for each line its tokens and the quantity, (channels, tokens).
        label: what the colour means.
        span: the values of the lightest and of the darkest colour, on a logarithmic scale.
    """
    figure, axes = subplots(1.8 * len(lines) + 0.7, rows=len(lines))
    norm = LogNorm(*span, clip=True)
    for ax, (tokens, heat) in zip(axes, lines, strict=True):
        picture = ax.imshow(heat, aspect="auto", cmap=HEAT, norm=norm, interpolation="nearest")
        ax.set_xticks(range(len(tokens)), tokens)
        ax.set(yticks=[], ylabel="channels")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    _colour_bar(figure, picture, axes, label)
    return figure


def text_heat(
    text: str, rows: Mapping[str, ArrayLike], *, label: str, span: tuple[float, float]
) -> Figure:
    """Draw a text several times, each time on a ground coloured by another quantity of its letters.

    Args:
        text: the letters; it is broken into four lines.
        rows: for each quantity its name and its values, (letters,).
        label: what the colour means.
        span: the values of the lightest and of the darkest colour, on a logarithmic scale.
    """
    figure, axes = subplots(1.4 * len(rows) + 0.7, rows=len(rows))
    norm, width = LogNorm(*span, clip=True), len(text) // 4
    for ax, (name, values) in zip(axes, rows.items(), strict=True):
        grid = np.asarray(values)[: 4 * width].reshape(4, width)
        picture = ax.imshow(grid, aspect="auto", cmap=HEAT, norm=norm, interpolation="nearest")
        for i, letter in enumerate(text[: 4 * width]):
            row, column = divmod(i, width)
            color = _readable_on(picture.cmap(norm(grid[row, column])))
            drawn = ax.text(column, row, letter, color=color, ha="center", va="center_baseline")
            # where the page is dark, the ground comes out as bright as the letter
            halo = "black" if color == "white" else "white"
            drawn.set_path_effects([withStroke(linewidth=1.8, foreground=halo)])
        ax.set_title(name)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    _colour_bar(figure, picture, axes, label)
    return figure


def _readable_on(color: tuple[float, ...]) -> str:
    """Return white or black, whichever has more contrast on a colour: at least 4.5 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = np.dot((0.2126, 0.7152, 0.0722), linear)
    return "white" if luminance < 0.179 else "black"


def _colour_bar(figure: Figure, picture, axes: list[Axes], label: str):
    """Add one bar below all panels, where it takes no width."""
    below = {"location": "bottom", "fraction": 0.05, "pad": 0.02, "aspect": 50}
    bar = figure.colorbar(picture, ax=axes, label=label, extend="both", **below)
    bar.set_ticks(ticks := spaced(*picture.get_clim(), 5), labels=written(ticks), minor=False)
    bar.ax.minorticks_off()


def tensors(rows: Sequence[Sequence[Mapping[str, ArrayLike]]]) -> Figure:
    """Draw tensors from left to right, each number a square: blue below zero, orange above.

    Args:
        rows: lines of the picture. Each is a list of columns, and a column says what stands in it,
            one below the other: {label: (n,) or (rows, n)}. A vector stands upright. Each tensor
            has a colour scale of its own.
    """
    gap, room = 2.6, 3.6  # squares between two columns, and below each tensor for its label
    lines = [
        [{label: np.atleast_2d(np.asarray(t).T).T for label, t in c.items()} for c in columns]
        for columns in rows
    ]
    widths = [[max(g.shape[1] for g in c.values()) for c in columns] for columns in lines]
    heights = [max(sum(len(g) + room for g in c.values()) for c in columns) for columns in lines]
    wide = max(sum(each) + gap * len(each) for each in widths)
    figure, (ax,) = subplots(WIDTH * sum(heights) / wide)
    top = 0.0
    for columns, each, high in zip(lines, widths, heights, strict=True):
        left = gap / 2 + (wide - sum(each) - gap * len(each)) / 2
        for column, width in zip(columns, each, strict=True):
            y = top + (high - sum(len(g) + room for g in column.values())) / 2
            for label, grid in column.items():
                _tensor(ax, grid, left + (width - grid.shape[1]) / 2, y, label)
                y += len(grid) + room
            left += width + gap
        top += high
    ax.set(xlim=(0, wide), ylim=(top, -0.2), aspect="equal")
    ax.axis("off")
    return figure


def _tensor(ax: Axes, grid: np.ndarray, x: float, y: float, label: str):
    rows, n = grid.shape
    scale = np.abs(grid).max() or 1.0
    extent = (x, x + n, y + rows, y)
    ax.imshow(grid / scale, cmap=SIGNED, vmin=-1, vmax=1, extent=extent, interpolation="nearest")
    for i in range(rows + 1):
        ax.plot([x, x + n], [y + i] * 2, color=GREY, lw=0.5, ls="-")
    for j in range(n + 1):
        ax.plot([x + j] * 2, [y, y + rows], color=GREY, lw=0.5, ls="-")
    ax.text(x + n / 2, y + rows + 0.3, label, ha="center", va="top")
