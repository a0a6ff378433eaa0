"""What pages need beyond Jupyter Book: the map of ideas, and cleaner heads."""

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
        items = "".join(
            self._item(number, step) for number, step in enumerate(steps, start=1)
        )
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


def drop_unused_scripts(app, pagename, templatename, context, doctree) -> None:
    """Keep each script once, and none of Thebe, which the book does not use.

    Sphinx 7 puts the scripts of some extensions on a page twice, and Thebe's
    settings name an outside host.
    """
    kept = {}
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        name = str(getattr(script, "filename", None) or script)
        if "thebe" not in name and "THEBE" not in body and "thebe" not in body:
            kept.setdefault((name, body), script)
    context["script_files"] = list(kept.values())
    styles = context.get("css_files", [])
    context["css_files"] = [style for style in styles if "thebe" not in str(style)]


def setup(app) -> dict:
    """Register with Sphinx."""
    app.add_directive("idea-map", IdeaMap)
    app.connect("html-page-context", drop_unused_scripts, priority=900)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
