"""The parts of drawn diagrams: boxes, sums, arrows and paths."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mamba_tutorial.plotting.style import BLUE, INK


def box(
    ax: Axes,
    centre: tuple[float, float],
    text: str,
    color: str = BLUE,
    dashed: bool = False,
):
    """Draw a text in a box with round corners."""
    x, y = centre
    box = FancyBboxPatch((x - 0.4, y - 0.3), 0.8, 0.6, boxstyle="round,pad=0.03,rounding_size=0.08")
    box.set(facecolor="white", edgecolor=color, linewidth=1.6, linestyle="--" if dashed else "-")
    ax.add_patch(box)
    ax.text(x, y, text, ha="center", va="center")


def sum_sign(ax: Axes, centre: tuple[float, float], sign: str = "+"):
    """Draw a sign, + or ×, in a circle, where lines meet."""
    ax.add_patch(plt.Circle(centre, 0.17, facecolor="white", edgecolor=INK, linewidth=1.4))
    (x, y), arm = centre, 0.08
    strokes = {"+": [(arm, 0), (0, arm)], "×": [(0.7 * arm, 0.7 * arm), (0.7 * arm, -0.7 * arm)]}
    for right, up in strokes[sign]:  # lines and no letter, which would not be in the middle
        ax.plot([x - right, x + right], [y - up, y + up], color=INK, lw=1.3, ls="-")


def arrow(ax: Axes, start, end, text: str = "", at=None, dashed: bool = False):
    """Draw an arrow, and a text at a place of its own."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(
        FancyArrowPatch(start, end, color=INK, lw=1.2, ls="--" if dashed else "-", **style)
    )
    if text:
        ax.text(*at, text, ha="center", va="center")


def path(ax: Axes, points: Sequence[tuple[float, float]], dashed: bool = False):
    """Draw a line through the points, with an arrow head at the last one."""
    *_, before, end = points
    ax.plot(*zip(*points[:-1], strict=True), color=INK, lw=1.2, ls="--" if dashed else "-")
    arrow(ax, before, end, dashed=dashed)
