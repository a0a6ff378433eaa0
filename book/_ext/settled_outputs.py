"""Progress bars stay off the pages: they are for those who wait, while a notebook runs."""

import re

from docutils import nodes

BAR = re.compile(r"'?[^\n|]*\d+%\|[#\d ]*\| *\d+/\d+ \[[^\n]*\]'?\s*")


def remove_bars(app, doctree: nodes.document) -> None:
    """Remove what `training.train` shows of its progress, and the box that held nothing else."""
    for block in list(doctree.findall(nodes.literal_block)):
        if BAR.fullmatch(block.astext()):
            box = block.parent
            box.remove(block)
            if not box.children and "output" in " ".join(box.get("classes", [])):
                box.parent.remove(box)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-read", remove_bars)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
