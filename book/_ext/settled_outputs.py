"""What cells print, as a page shows it: without progress bars, and sources in colours."""

import re

from docutils import nodes

SOURCE = re.compile(r"[ +-]{0,2}\s*(def|class|@)\b.*", re.DOTALL)
CHANGES = re.compile(r"([ +-]( .*)?\n?|\n)+")
BAR = re.compile(r"'?[^\n|]*\d+%\|[#\d ]*\| *\d+/\d+ \[[^\n]*\]'?\s*")


def remove_bars(app, doctree: nodes.document) -> None:
    """Remove what `training.train` shows of its progress, and the box that held nothing else.

    It is for those who wait, while a notebook runs.
    """
    for block in list(doctree.findall(nodes.literal_block)):
        if BAR.fullmatch(block.astext()):
            box = block.parent
            box.remove(block)
            if not box.children and "output" in " ".join(box.get("classes", [])):
                box.parent.remove(box)


def colour_sources(app, doctree: nodes.document) -> None:
    """Colour what is a source, or one that is shown as a difference to another."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext()
        if "output" in block.get("classes", []) and SOURCE.fullmatch(text):
            changed = CHANGES.fullmatch(text) and re.search(r"^[+-] ", text, re.MULTILINE)
            block["language"] = "diff" if changed else "python"


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-read", remove_bars)
    app.connect("doctree-read", colour_sources)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
