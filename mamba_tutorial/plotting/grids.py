"""Numbers as coloured squares: matrices, images, and what a model does at each token."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mamba_tutorial.plotting.style import BLUE, GREY, HEAT, INK, ORANGE, WIDTH, keep_width, subplots


def matrices(panels: Mapping[str, ArrayLike], *, height: float = 3.2, bar: bool = False) -> Figure:
    """Draw matrices side by side, blue below zero and orange above, white at zero.

    Args:
        panels: {title: (rows, columns)}; a colour scale of its own for each.
        height: height of the picture in inches.
        bar: add a colour bar to each.
    """
    figure, axes = subplots(height, columns=len(panels))
    colors = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
    for ax, (title, matrix) in zip(axes, panels.items(), strict=True):
        matrix = np.asarray(matrix)
        top = np.abs(matrix).max()
        image = ax.imshow(matrix, cmap=colors, vmin=-top, vmax=top, interpolation="nearest")
        ax.set_title(title)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        if bar:
            figure.colorbar(image, ax=ax, shrink=0.8)
    keep_width(figure)
    return figure


def images(panels: Mapping[str, ArrayLike], sequence: ArrayLike, xlabel: str) -> Figure:
    """Draw grey images in a row, and below them the first one as a sequence of numbers."""
    figure = plt.figure(figsize=(WIDTH, 3.3))
    plt.close(figure)
    grid = figure.add_gridspec(2, len(panels))
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
    figure, axes = subplots(1.6 * len(lines) + 0.2, rows=len(lines))
    norm = LogNorm(*span, clip=True)
    for ax, (tokens, heat) in zip(axes, lines, strict=True):
        picture = ax.imshow(heat, aspect="auto", cmap=HEAT, norm=norm, interpolation="none")
        ax.set_xticks(range(len(tokens)), tokens, family="monospace", fontsize=9.5)
        ax.set(yticks=[], ylabel="channels")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, label=label, fraction=0.02, pad=0.01, extend="both")
    return figure


def text_heat(
    text: str, rows: Mapping[str, ArrayLike], *, label: str, span: tuple[float, float]
) -> Figure:
    """Draw a text several times, each time on a ground coloured by another quantity of its letters.

    Args:
        text: the letters; it is broken into two lines.
        rows: for each quantity its name and its values, (letters,).
        label: what the colour means.
        span: the values of the lightest and of the darkest colour, on a logarithmic scale.
    """
    figure, axes = subplots(0.85 * len(rows) + 0.2, rows=len(rows))
    norm, width = LogNorm(*span, clip=True), len(text) // 2
    for ax, (name, values) in zip(axes, rows.items(), strict=True):
        grid = np.asarray(values)[: 2 * width].reshape(2, width)
        picture = ax.imshow(grid, aspect="auto", cmap=HEAT, norm=norm, interpolation="none")
        for i, letter in enumerate(text[: 2 * width]):
            row, column = divmod(i, width)
            color = "white" if norm(grid[row, column]) > 0.75 else INK
            place = {"ha": "center", "va": "center_baseline"}
            ax.text(column, row, letter, family="monospace", fontsize=10, color=color, **place)
        ax.set_title(name, fontsize=9.5)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, label=label, fraction=0.02, pad=0.01, extend="both")
    return figure


def tensors(columns: Sequence[Mapping[str, ArrayLike]]) -> Figure:
    """Draw tensors from left to right, each number a square: blue below zero, orange above.

    Args:
        columns: what stands in each column, one below the other: {label: (n,) or (rows, n)}. A
            vector stands upright. Each tensor has a colour scale of its own.
    """
    colors = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
    grids = [
        {label: np.atleast_2d(np.asarray(t).T).T for label, t in column.items()}
        for column in columns
    ]
    gap, room = 2.2, 3.4  # squares between two columns, and below each tensor for its label
    widths = [max(grid.shape[1] for grid in column.values()) for column in grids]
    heights = [sum(len(grid) + room for grid in column.values()) for column in grids]
    wide, high = sum(widths) + gap * len(widths), max(heights)
    figure, (ax,) = subplots(WIDTH * high / wide)
    left = gap / 2
    for column, width, height in zip(grids, widths, heights, strict=True):
        top = (high - height) / 2
        for label, grid in column.items():
            rows, n = grid.shape
            x = left + (width - n) / 2
            scale = np.abs(grid).max() or 1.0
            extent = (x, x + n, top + rows, top)
            ax.imshow(grid / scale, cmap=colors, vmin=-1, vmax=1, extent=extent)
            for i in range(rows + 1):
                ax.plot([x, x + n], [top + i] * 2, color=GREY, lw=0.5, ls="-")
            for j in range(n + 1):
                ax.plot([x + j] * 2, [top, top + rows], color=GREY, lw=0.5, ls="-")
            ax.text(x + n / 2, top + rows + 0.3, label, ha="center", va="top", fontsize=9)
            top += rows + room
        left += width + gap
    ax.set(xlim=(0, wide), ylim=(high, -0.2), aspect="equal")
    ax.axis("off")
    return figure
