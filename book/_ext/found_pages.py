"""What finds the book: a description and a picture of each page, and the words around a result.

A page opened as a file may not read other files, so the search page brings the text of all pages
with it. Formulas stand there in characters, not in TeX.
"""

import itertools
import json
import operator
import re
import unicodedata
from html import escape
from pathlib import Path

from docutils import nodes

SIGNS = {
    "cdot": "·", "times": "×", "pm": "±", "oplus": "⊕", "odot": "⊙", "wedge": "∧", "in": "∈",
    "ni": "∋", "to": "→", "mapsto": "↦", "leftarrow": "←", "Longrightarrow": "⟹", "infty": "∞",
    "approx": "≈", "le": "≤", "ge": "≥", "ne": "≠", "partial": "∂", "sum": "Σ", "prod": "Π",
    "int": "∫", "sqrt": "√", "ell": "ℓ", "dots": "…", "cdots": "…", "vdots": "…", "ddots": "…",
    "lvert": "|", "rvert": "|", "varepsilon": "ε", "varphi": "φ",
}  # fmt: skip
ACCENTS = {"bar": "\u0304", "tilde": "\u0303", "hat": "\u0302"}
LAYOUT = re.compile(
    r"\\(left|right|big[lr]?|Big[lr]?|text(style)?|math(rm|sf)|operatorname|q?quad|underbrace)"
    r"(?![a-z])|\\[,;!:]|\\\\|&"
)
GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"


def characters(tex: str) -> str:
    """Write a formula in plain characters, as well as they can."""
    text = re.sub(r"\\(?:begin|end)\{[^}]*\}", " ", tex)
    for name, accent in ACCENTS.items():
        text = re.sub(
            rf"\\{name}\s*\{{?\s*(\\?[A-Za-z]+?)(?![a-z])\}}?",
            rf"\1{accent}",
            text,
        )
    for _ in range(3):  # a fraction may stand in a fraction
        text = re.sub(rf"\\t?frac\s*{GROUP}\s*{GROUP}", r"(\1)/(\2)", text)
    text = re.sub(r"\\t?frac\s*(\\?[A-Za-z]+|\d)\s*(\w)", r"\1/\2", text)
    text = LAYOUT.sub(" ", text).replace("{", "").replace("}", "")
    return " ".join(re.sub(r"\\([A-Za-z]+)", sign, text).replace("\\", "").split())


def sign(match: re.Match) -> str:
    """Return the character of a command of TeX, or its name as a word."""
    name = match[1]
    if name in SIGNS:
        return SIGNS[name]
    case = "CAPITAL" if name[0].isupper() else "SMALL"
    letter = {"lambda": "lamda"}.get(name.lower(), name.lower())  # as Unicode spells it
    try:
        return unicodedata.lookup(f"GREEK {case} LETTER {letter.upper()}")
    except KeyError:
        return f"{name} "


def page_text(doctree: nodes.document) -> list[tuple[str, str]]:
    """Return the paragraphs, titles, captions and listings of a page, each with where it stands.

    That is the name of the nearest section, figure, exercise or term that a link can lead to.
    """
    doctree = doctree.deepcopy()
    for formula in list(doctree.findall(lambda n: isinstance(n, (nodes.math, nodes.math_block)))):
        formula.replace_self(nodes.inline("", characters(formula.astext())))
    for raw in list(doctree.findall(nodes.raw)):
        raw.parent.remove(raw)
    blocks = doctree.findall(
        lambda n: isinstance(n, nodes.TextElement) and not isinstance(n.parent, nodes.TextElement)
    )
    return [(place(block), text) for block in blocks if (text := " ".join(block.astext().split()))]


def place(node: nodes.Node) -> str:
    """Return the name of what a node stands in, for a link; nothing for the top of the page."""
    section = node.parent
    if section is None or isinstance(section.parent, nodes.document):
        return ""
    if isinstance(section, nodes.definition_list_item):
        return next(iter(section[0]["ids"]), place(section))
    # what is in an exercise or a solution has the same name in all of them
    own = [name for name in section["ids"] if name not in {"exercise-content", "solution-content"}]
    return own[0] if own else place(section)


def describe(app, pagename, templatename, context, doctree) -> None:
    """Put a description and a picture into the head of a page; bring the texts to the search."""
    if pagename == "search":
        app.add_js_file("search_texts.js")
        app.add_js_file("search_excerpts.js")
    if doctree is None:
        return
    title = re.sub("<[^>]*>", "", context["title"])
    about = f"{title}, a page of the book {app.config.html_title}"
    if not any(doctree.findall(nodes.citation)):
        about = next((text for _, text in page_text(doctree) if len(text) > 60), about)
    if len(about) > 200:
        about = about[:200].rpartition(" ")[0] + " …"
    values = {"type": "article", "title": title, "description": about,
              "site_name": app.config.html_title}  # fmt: skip
    if site := app.config.html_baseurl:
        picture = context.get("preview", "_static/screenshot.png")
        values |= {"image": site + picture, "url": context["pageurl"]}
    tags = [f'<meta name="description" content="{escape(about)}" />']
    tags += [f'<meta property="og:{k}" content="{escape(v)}" />' for k, v in values.items()]
    context["metatags"] = context.get("metatags", "") + "\n    " + "\n    ".join(tags)


def write_search_texts(app, exception) -> None:
    """Write the text of all pages, place by place, where the search page finds it."""
    if exception or app.builder.format != "html":
        return
    env = app.env
    pages = {name: env.get_and_resolve_doctree(name, app.builder) for name in env.found_docs}
    texts = {
        name: [
            (where, " ".join(text for _, text in blocks))
            for where, blocks in itertools.groupby(page_text(page), key=operator.itemgetter(0))
        ]
        for name, page in pages.items()
    }
    script = f"window.searchTexts = {json.dumps(texts, ensure_ascii=False, sort_keys=True)};\n"
    (Path(app.outdir) / "_static" / "search_texts.js").write_text(script, "utf-8")


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", describe)
    app.connect("build-finished", write_search_texts, priority=600)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
