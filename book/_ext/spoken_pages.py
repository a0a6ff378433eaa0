"""What pages say to those who hear them, and how lines that stand alone are marked."""

from docutils import nodes

# MyST-NB hides the words "Show code cell source" behind this label, which says less.
VAGUE = ' aria-label="Toggle hidden content"'


def name_controls(app, pagename, templatename, context, doctree) -> None:
    """Let what opens something be called by what it opens."""
    context["body"] = context.get("body", "").replace(VAGUE, "")
    if navigation := context.get("generate_toctree_html"):
        context["generate_toctree_html"] = lambda **options: str(navigation(**options)).replace(
            "<summary>", '<summary aria-label="The pages of this chapter">'
        )


def mark_single_lines(app, doctree, docname) -> None:
    """Mark outputs of one line, which may break on a narrow screen: no columns get lost."""
    for cell in doctree.findall(lambda n: "cell_output" in getattr(n, "attributes", {}).get("classes", ())):
        for output in cell.findall(nodes.literal_block):
            if "\n" not in output.astext().strip():
                output["classes"].append("one-line")


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", name_controls, priority=900)
    app.connect("doctree-resolved", mark_single_lines)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
