"""What all pictures share: colours, one typeface in one size, and the width of the page.

Colours keep apart in every common form of colour blindness and differ in lightness, and lines
differ in dash, so a picture survives a grey printer. The background is white; the book's style
sheet turns it dark where the page is.

A page of the book shows a picture as wide as its text. On a phone that is about 350 pixels, and
there the type must still be read: it is 9 pixels high at least, which `WIDTH` and `SIZE` decide.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from math import ceil

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
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
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
WIDTH = 6.25  # inches: 600 pixels of a page
SIZE = 11.7  # points, of all type: 9.1 pixels where the picture is 350 pixels wide
EM = SIZE / 72  # inches

Panels = Mapping[str, Mapping[str, ArrayLike]]

# the typeface of the book's headings and captions; what it lacks comes from matplotlib's own
for _font in files(__package__).joinpath("fonts").iterdir():
    if _font.name.endswith(".ttf"):
        with as_file(_font) as _path:
            font_manager.fontManager.addfont(_path)

plt.rcParams.update(
    {
        "figure.dpi": 96,
        "figure.figsize": (WIDTH, 3.0),
        "figure.constrained_layout.use": True,
        "font.family": ["Figure Sans", "DejaVu Sans"],
        "font.size": SIZE,
        "mathtext.fontset": "custom",
        "mathtext.rm": "Figure Sans",
        "mathtext.it": "Figure Sans:italic",
        "mathtext.bf": "Figure Sans:bold",
        "mathtext.cal": "Figure Sans:italic",
        "axes.prop_cycle": cycler(
            color=[BLUE, ORANGE, TEAL, PLUM, INK, "#6b727b"],
            linestyle=["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1)), (0, (6, 2))],
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.labelsize": SIZE,
        "axes.labelpad": 2,
        "axes.titlepad": 4,
        "axes.titlesize": SIZE,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "lines.linewidth": 1.7,
        "legend.frameon": False,
        "legend.fontsize": SIZE,
        "legend.borderpad": 0.2,
        "legend.borderaxespad": 0.2,
        "legend.labelspacing": 0.25,
        "legend.columnspacing": 1.4,
        "legend.handletextpad": 0.5,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": SIZE,
        "ytick.labelsize": SIZE,
        "text.color": INK,
        "svg.hashsalt": "the same picture, the same file",
    }
)


def subplots(height: float, rows: int = 1, columns: int = 1, **shared) -> tuple[Figure, list[Axes]]:
    """Return a figure of the page's width and its axes in one list.

    The figure is closed for pyplot at once. Otherwise a notebook shows it twice: once as the value
    of its cell, and once because it is open.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **shared)
    plt.close(figure)
    return figure, list(axes.flat)


def legend_columns(labels: Sequence[str], width: float = WIDTH) -> int:
    """Return the most columns of a legend that have room in a width, evenly filled."""
    family = font_manager.FontProperties(family=plt.rcParams["font.family"])
    extents = [TextPath((0, 0), label, SIZE, prop=family).get_extents() for label in labels]
    widths = [extent.width / 72 + 4.1 * EM for extent in extents]  # with a line and the gaps
    for columns in range(len(labels), 1, -1):
        rows = ceil(len(labels) / columns)
        filled = ceil(len(labels) / rows)
        total = sum(max(widths[i * rows : (i + 1) * rows], default=0) for i in range(filled))
        if columns == filled and total < width:
            return columns
    return 1


def legend_above(figure: Figure, ax: Axes):
    """Put the legend of `ax` above all panels, at the left, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    columns = legend_columns(labels)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def legend_below(ax: Axes, width: float):
    """Put the legend of one panel, which is so wide in inches, under the label of its x axis."""
    columns = legend_columns(ax.get_legend_handles_labels()[1], width)
    below = ax.transAxes + ScaledTranslation(0, -3.1 * EM, ax.figure.dpi_scale_trans)
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=columns)
