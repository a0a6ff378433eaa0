"""How a picture gets onto a page: as a drawing, sharp at every size, in few bytes."""

import io
import re
import sys

from matplotlib.figure import Figure

PLACES = re.compile(r'(?: d| x| y|points)="[^"]*"|translate\([^)]*\)')
DPI = 192  # of the images in a drawing, such as matrices: twice the pixels of a page


def svg(figure: Figure) -> str:
    """Return a figure as SVG on one line, with no more digits than anybody can see."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S
    )
    text = PLACES.sub(lambda match: re.sub(r"-?\d+\.\d+", _shortened, match[0]), text)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    return re.sub(r">\s+<", "><", re.sub(r"\s+", " ", text)).strip()


def _shortened(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def show_in_notebooks() -> None:
    """Let a notebook show figures by `svg` and in no other form; elsewhere, do nothing."""
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython

    shell = get_ipython()
    if hasattr(shell, "kernel"):
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")  # and not PNG
        shell.display_formatter.formatters["image/svg+xml"].for_type(Figure, svg)
