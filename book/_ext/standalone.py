"""What a chapter says without the book around it, and the notebooks that the pages offer.

A notebook alone knows neither the literature nor the numbers of figures and equations, and outside
of the book a directive is a listing. Here they are written out in plain Markdown. JupyterLab is
given the same words by `book/_lab/book_contents.py`.
"""

import json
import re
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from pybtex.database import parse_file

from citations import names, tell_apart

BOOK = Path(__file__).resolve().parents[1]
FOLDED = {"hide-input", "hide-cell", "remove-cell", "remove-input"}
COLLAPSED = "jp-MarkdownHeadingCollapsed"
TO_WORK_IN = "# your turn"
ROLE = re.compile(r"\{(cite:p|cite:t|eq|numref|ref)\}`([^`]+)`")
EQUATION = re.compile(r"^\$\$\n(.*?)\n\$\$ \(([\w-]+)\)", re.DOTALL | re.MULTILINE)
LABEL = re.compile(r"```\{exercise\}.*?\n:label: ([\w-]+)", re.DOTALL)
EXERCISE = re.compile(r"```\{exercise\} (.*?)\n:label: ([\w-]+)\n+(.*?)\n```", re.DOTALL)
SOLUTION = re.compile(r"```\{solution-start\} [\w-]+\n.*?```", re.DOTALL)
BOX = re.compile(r"```\{admonition\} (.*?)\n(?::\w+:[^\n]*\n)*\n*(.*?)\n```", re.DOTALL)


def alone(notebook: NotebookNode, page: str, site: str) -> NotebookNode:
    """Return a chapter that can be read anywhere.

    Args:
        notebook: the chapter, which is changed.
        page: the name of its file, without the ending.
        site: the address of the book, for pages that are no notebooks.
    """
    kept = (cell for cell in notebook.cells if "{solution-end}" not in cell.source)
    notebook.cells = with_extras(list(kept), page)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if SOLUTION.search(cell.source):
                cell.metadata[COLLAPSED] = True
            cell.source = plain(cell.source, page, site)
    return notebook


def plain(text: str, page: str, site: str) -> str:
    """Return a text of a chapter in plain Markdown."""
    text = ROLE.sub(lambda role: words_for(*role.groups()), text)
    text = EQUATION.sub(numbered, text)
    text = EXERCISE.sub(lambda e: f"#### {numbers()[e[2]]} ({e[1]})\n\n{e[3]}", text)
    text = SOLUTION.sub("#### Solution", text)
    text = BOX.sub(lambda box: quoted(box[1], box[2]), text)

    def address(link: re.Match) -> str:
        file = files().get(link[1], "")
        return f"]({site}book/{link[1]}.html)" if file.endswith(".md") else f"]({file or link[1]})"

    return re.sub(r"\]\((\w+)\)", address, text)


def numbered(equation: re.Match) -> str:
    """Return an equation with the number of the book beside it, in the place of its label."""
    body, label = equation.groups()
    return f"$$\n{body} \\tag{{{numbers()[label].strip('()')}}}\n$$"


def quoted(title: str, body: str) -> str:
    """Return a box as a quotation; its terms and what they mean stand on one line."""
    body = re.sub(r"^(\S.*)\n: +", r"**\1.** ", body, flags=re.MULTILINE)
    lines = [f"**{title}**", "", *body.splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def with_extras(cells: list[NotebookNode], page: str) -> list[NotebookNode]:
    """Return the cells of a chapter, with captions and cells to work in, pictures' code folded."""
    found = []
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        found.append(cell)
        label = cell.cell_type == "markdown" and LABEL.search(cell.source)
        if label and not is_tagged(following, "work"):
            found.append(extra("code", f"work-{label[1]}", "work", TO_WORK_IN))
        if cell.cell_type == "code" and FOLDED & set(cell.metadata.get("tags", [])):
            cell.metadata.jupyter = {"source_hidden": True}
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if figure.get("caption"):
            text = f"*{numbers()[figure.name]}.* {figure.caption}"
            found.append(extra("markdown", f"caption-{cell.id}", "caption", text))
    return found


def extra(kind: str, name: str, tag: str, source: str) -> NotebookNode:
    """Return a cell that the file does not have."""
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return make(source, id=name[:64], metadata={"tags": [tag]})


def is_tagged(cell: NotebookNode | None, tag: str) -> bool:
    """Whether a cell has a tag."""
    return cell is not None and tag in cell.metadata.get("tags", [])


def words_for(role: str, target: str) -> str:
    """Return what the book shows for a citation or a reference."""
    return cited(role, target) if role.startswith("cite") else numbers().get(target, target)


def cited(kind: str, keys: str) -> str:
    """Return a citation in words, in brackets or as a part of the sentence."""
    entries = [literature()[key.strip()] for key in keys.split(",")]
    works = [(names(entry), entry.fields["year"]) for entry in entries]
    if kind == "cite:t":
        return ", ".join(f"{who} ({year})" for who, year in works)
    return f"({'; '.join(f'{who}, {year}' for who, year in works)})"


@cache
def literature() -> dict:
    """Return the entries of the literature, told apart as in the book."""
    entries = parse_file(BOOK / "references.bib").entries
    tell_apart(entries.values())
    return dict(entries)


@cache
def files() -> dict[str, str]:
    """Return the pages of the book: name → file."""
    return {path.stem: path.name for kind in ("*.ipynb", "*.md") for path in BOOK.glob(kind)}


@cache
def labels_of_equations() -> dict[str, list[str]]:
    """Return the labels of the equations of each notebook, in order."""
    found = {}
    for path in sorted(BOOK.glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        found[path.stem] = [label for _, label in EQUATION.findall(text)]
    return found


@cache
def numbers() -> dict[str, str]:
    """Return what the book calls its equations, figures and exercises: label → words."""
    found, counts = {}, {}

    def count(kind: str, chapter: int) -> str:
        counts[kind, chapter] = counts.get((kind, chapter), 0) + 1
        return f"{chapter}.{counts[kind, chapter]}"

    for path in sorted(BOOK.glob("[0-9]*.ipynb")):
        chapter = int(path.stem[:2])
        for label in labels_of_equations()[path.stem]:
            found[label] = f"({count('equation', chapter)})"
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            if name := cell["metadata"].get("mystnb", {}).get("figure", {}).get("name"):
                found[name] = f"Figure {count('figure', chapter)}"
            for label in LABEL.findall("".join(cell["source"])):
                found[label] = f"Exercise {count('exercise', chapter)}"
    return found


def write_downloads(app, exception) -> None:
    """Put in the place of each notebook that a page offers one that can be read alone."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir, "_sources").rglob("*.ipynb"):
        notebook = alone(nbformat.read(path, 4), path.stem, app.config.html_baseurl)
        nbformat.write(notebook, path)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("build-finished", write_downloads)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
