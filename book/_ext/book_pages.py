"""Drawings beyond Jupyter Book: the map of ideas, one that moves, one in the card of a chapter."""

import re
from html import escape
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

DRAWINGS = Path(__file__).parent / "drawings"


class IdeaMap(SphinxDirective):
    """Draw the steps of the book as boxes joined by arrows.

    The body is a YAML list. Each step has a `title`, an `idea`, a `page` (a
    document beside this one), a `drawing` (an SVG file beside this
    extension) and, but for the first, `removes`: the limit of the step before that
    it takes away. A box leads to its page once the page exists.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the map as one block of HTML."""
        self.env.note_reread()  # for chapters written since the last build
        steps = yaml.safe_load("\n".join(self.content))
        items = "".join(self._item(number, step) for number, step in enumerate(steps, start=1))
        return [nodes.raw("", f'<ol class="idea-map">{items}</ol>', format="html")]

    def _item(self, number: int, step: dict) -> str:
        folder = self.env.docname.rpartition("/")[0]
        page = f"{folder}/{step['page']}".lstrip("/")
        written = page in self.env.found_docs
        removes = step.get("removes")
        label = f'<p class="removes">{escape(removes)}</p>' if removes else ""
        drawing = (DRAWINGS / f"{step['drawing']}.svg").read_text(encoding="utf-8")
        state = "" if written else '<span class="unwritten">being written</span>'
        box = (
            f"{drawing}"
            f'<span class="title"><b>{number}</b> {escape(step["title"])}</span>'
            f'<span class="idea">{escape(step["idea"])}</span>{state}'
        )
        if written:
            uri = self.env.app.builder.get_relative_uri(self.env.docname, page)
            return f'<li>{label}<a class="box" href="{uri}">{box}</a></li>'
        return f'<li>{label}<div class="box">{box}</div></li>'


class MovingDrawing(SphinxDirective):
    """Show a drawing that `book.css` moves, with a caption and a way to hold it still.

    The argument names an SVG file beside this extension, the body is the caption. As it is drawn,
    it stands: so it is on paper, and for readers who have asked for less motion.
    """

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the drawing as one block of HTML."""
        name = self.arguments[0]
        drawing = (DRAWINGS / f"{name}.svg").read_text(encoding="utf-8")
        self.env.note_dependency(str(DRAWINGS / f"{name}.svg"))
        caption = escape(" ".join(self.content))
        hold = '<label class="hold"><input type="checkbox"> hold still</label>'
        html = f"{drawing}{hold}<figcaption>{caption}</figcaption>"
        return [nodes.raw("", f'<figure class="moving {name}">{html}</figure>', format="html")]


def drawings_of_chapters(front: str) -> dict[str, str]:
    """Return for the number of a chapter, two digits, the drawing that the map has for it."""
    steps = yaml.safe_load(re.search(r"```\{idea-map\}\n(.*?)```", front, re.DOTALL)[1])
    return {step["page"][:2]: step["drawing"] for step in steps}


def draw_in_cards(app, doctree: nodes.document) -> None:
    """Put a chapter's drawing into the cards of its pages."""
    front = Path(app.srcdir) / "book/index.md"
    folder, _, page = app.env.docname.rpartition("/")
    if folder != "book" or not front.exists():
        return
    name = drawings_of_chapters(front.read_text(encoding="utf-8")).get(page[:2])
    for card in doctree.findall(nodes.admonition):
        if name and "chapter-card" in card["classes"]:
            drawing = (DRAWINGS / f"{name}.svg").read_text(encoding="utf-8")
            html = f'<div class="card-drawing">{drawing}</div>'
            card.insert(1, nodes.raw("", html, format="html"))


def setup(app) -> dict:
    """Register with Sphinx."""
    app.add_directive("idea-map", IdeaMap)
    app.add_directive("moving-drawing", MovingDrawing)
    app.connect("doctree-read", draw_in_cards)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
