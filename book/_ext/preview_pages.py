"""The picture with which others show a link to a chapter: its drawing and its title.

They want a bitmap at an absolute address. So it is made only where the site knows its own address.
"""

import re
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from xml.etree import ElementTree

from fontTools.pens.recordingPen import RecordingPen
from fontTools.svgLib.path import parse_path
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, Patch, PathPatch
from matplotlib.path import Path as Outline

from book_pages import DRAWINGS, drawings_of_chapters

FOLDER = "_previews"
INK, ACCENT, QUIET = "#1b1f24", "#a84c05", "#5a626c"
CODES = {"moveTo": Outline.MOVETO, "lineTo": Outline.LINETO, "curveTo": Outline.CURVE4}


def shapes(name: str) -> list[Patch]:
    """Return what a drawing consists of, in its own units, as the style sheet would show it."""
    root = ElementTree.parse(DRAWINGS / f"{name}.svg").getroot()
    dots = {circle for group in root.iter("g") for circle in group}
    found = []
    for element in root.iter():
        kind = element.get("class")
        color, width = (ACCENT, 8) if kind == "accent" else (INK, 5.5)
        look = {"edgecolor": color, "facecolor": "none", "linewidth": width}
        look |= {"capstyle": "round", "joinstyle": "round", "alpha": 0.35 if kind == "faint" else 1}
        if element.tag == "path":
            found.append(PathPatch(outline(element.get("d")), **look))
        elif element.tag == "circle":
            filled = {"facecolor": color} if element in dots or kind == "accent" else {}
            centre = float(element.get("cx")), float(element.get("cy"))
            found.append(Circle(centre, float(element.get("r")), **look | filled))
    return found


def outline(description: str) -> Outline:
    """Return a path as matplotlib has it."""
    pen = RecordingPen()
    parse_path(description, pen)
    points, codes = [], []
    for action, given in pen.value:
        if action == "closePath":
            points.append(points[-1])
            codes.append(Outline.CLOSEPOLY)
        elif action != "endPath":
            points += given
            codes += [CODES[action]] * len(given)
    return Outline(points, codes)


def draw(path: Path, drawing: str, number: str, title: str, book: str) -> None:
    """Draw the picture of a page, in the proportions that previews have."""
    fonts = Path(find_spec("mamba_tutorial").submodule_search_locations[0], "plotting/fonts")
    plain, bold = (FontProperties(fname=fonts / f"FigureSans-{k}.ttf") for k in ("Regular", "Bold"))
    figure = Figure((12, 6.3), dpi=100)
    space = figure.add_axes((0, 0, 1, 1), xlim=(0, 240), ylim=(126, 0))
    space.axis("off")
    space.axhspan(0, 3, color=ACCENT)
    picture = figure.add_axes((0.06, 0.25, 0.4, 0.5), xlim=(0, 120), ylim=(64, 0), aspect="equal")
    picture.axis("off")
    for shape in shapes(drawing):
        picture.add_patch(shape)
    space.text(124, 30, number, fontproperties=bold, size=40, color=ACCENT)
    space.text(124, 38, fill(title, 17), fontproperties=bold, size=52, color=INK, va="top")
    space.text(124, 108, book, fontproperties=plain, size=28, color=QUIET)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def preview(app, pagename, templatename, context, doctree) -> None:
    """Give a page of a chapter a picture of its own."""
    folder, _, page = pagename.rpartition("/")
    front = Path(app.srcdir, "book/index.md")
    if doctree is None or folder != "book" or not app.config.html_baseurl or not front.exists():
        return
    if drawing := drawings_of_chapters(front.read_text("utf-8")).get(page[:2]):
        number, _, title = unescape(re.sub("<[^>]*>", "", context["title"])).partition(" ")
        context["preview"] = f"{FOLDER}/{page}.png"
        place = Path(app.outdir, context["preview"])
        draw(place, drawing, number.strip("."), title, app.config.html_title)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", preview, priority=400)  # before the page is described
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
