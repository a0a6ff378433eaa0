"""What pages say to those who hear them, and what may break on a narrow screen."""

import re

from docutils import nodes

BETWEEN = re.compile(r"(?<=\d) (?=[%×])|(?<=\d\N{NO-BREAK SPACE}×) (?=\d)|(?<=\d ×) (?=\d)")
REPLACED = {
    # a label that hides the words "Show code cell source", which say more
    ' aria-label="Toggle hidden content"': "",
    # the corner of a table is no heading of anything
    '<th class="head"><p></p></th>': "<td></td>",
    # a role that is no longer one
    'role="doc-biblioentry"': 'role="listitem"',
}


def name_controls(app, pagename, templatename, context, doctree) -> None:
    """Let what opens something be called by what it opens."""
    for before, after in REPLACED.items():
        context["body"] = context.get("body", "").replace(before, after)
    if navigation := context.get("generate_toctree_html"):
        context["generate_toctree_html"] = lambda **options: str(navigation(**options)).replace(
            "<summary>", '<summary aria-label="The pages of this chapter">'
        )


def name_download(app, pagename, templatename, context, doctree) -> None:
    """Say what the button with the arrow brings: the theme says ".ipynb"."""
    for menu in context.get("header_buttons", []):
        for button in menu.get("buttons", []):
            if button.get("label") == "download-source-button":
                kind = "notebook" if button["text"] == ".ipynb" else "text"
                button["text"] = f"this page as a {kind} ({button['text']})"
                button["tooltip"] = f"Download this page as a {kind}"


def mark_sentences(app, doctree, docname) -> None:
    """Mark outputs that are no table and no source: a line that breaks there loses no column."""
    cells = (node for node in doctree.findall(nodes.container) if "cell_output" in node["classes"])
    for cell in cells:
        for output in cell.findall(nodes.literal_block):
            if not re.search(r"^\s|\S  ", output.astext().strip(), re.MULTILINE):
                output["classes"].append("sentences")


def keep_together(app, doctree, docname) -> None:
    """Do not break a line between a number and its sign, in text: 90 %, 8 × 2048."""
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.FixedTextElement | nodes.literal | nodes.math):
            kept = BETWEEN.sub("\N{NO-BREAK SPACE}", text)
            if kept != text:
                text.parent.replace(text, nodes.Text(kept))


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", name_controls, priority=900)
    app.connect("html-page-context", name_download, priority=900)
    app.connect("doctree-resolved", mark_sentences)
    app.connect("doctree-resolved", keep_together)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
