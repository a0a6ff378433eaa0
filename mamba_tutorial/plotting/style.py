"""What all pictures share: colours, type, and figures of the page's width.

Colours keep apart in every common form of colour blindness and differ in lightness, and lines
differ in dash, so a picture survives a grey printer. The background is white; the book's style
sheet turns it dark where the page is.
"""

import sys
from collections.abc import Mapping

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

INK, BLUE, ORANGE, TEAL, PLUM, GREY = (
    "#1b1f24",
    "#1f5fa8",
    "#d9731a",
    "#1d9a83",
    "#8a3f8f",
    "#8a9099",
)
PALE = "#e8edf3"
HEAT = LinearSegmentedColormap.from_list("heat", ["white", "#f6c9a0", ORANGE, "#6b3206"])
WIDTH = 8.0  # inches: the width of a page's text

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.figsize": (WIDTH, 3.2),
        "figure.constrained_layout.use": True,
        "font.size": 10.5,
        "mathtext.fontset": "cm",
        "axes.prop_cycle": cycler(
            color=[BLUE, ORANGE, TEAL, PLUM, INK],
            linestyle=["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1))],
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
    }
)

if "IPython" in sys.modules:
    from IPython import get_ipython

    if hasattr(get_ipython(), "kernel"):  # in a notebook: twice the pixels at the same size
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")

Panels = Mapping[str, Mapping[str, ArrayLike]]


def subplots(height: float, rows: int = 1, columns: int = 1, **shared) -> tuple[Figure, list]:
    """Return a figure of the page's width and its axes in one list.

    The figure is closed for pyplot at once. Otherwise a notebook shows it twice: once as the value
    of its cell, and once because it is open.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **shared)
    plt.close(figure)
    return figure, list(axes.flat)


def legend_below(ax: Axes, columns: int):
    """Put the legend under the label of the x axis, where it covers no curve."""
    below = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns)


def keep_width(figure: Figure):
    """Keep the margins of a picture narrower than the text, which notebooks would cut away."""
    page = Rectangle((0, 0), 1, 1, transform=figure.transFigure, fill=False, linewidth=0)
    figure.add_artist(page)
