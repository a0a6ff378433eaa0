"""What a page shows of cells: no progress bars, sources in colours, folds that stand together."""

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


def is_folded(node: nodes.Node) -> bool:
    """Whether a node is a cell whose code is folded."""
    return isinstance(node, nodes.container) and node.get("hide_mode") == "input"


def fold_together(app, doctree: nodes.document) -> None:
    """Put folded code into the fold of the cell right after it, if nothing is printed between."""
    for cell in list(doctree.findall(is_folded)):
        after = cell.next_node(descend=False, siblings=True)
        if len(cell.children) == 1 and after is not None and is_folded(after):
            after.children[0][:0] = cell.children[0].children
            cell.parent.remove(cell)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-read", remove_bars)
    app.connect("doctree-read", colour_sources)
    app.connect("doctree-read", fold_together)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
