"""The chapters as JupyterLab shows them, and as the files keep them.

In JupyterLab a chapter stands alone: it knows neither the literature nor the figures and equations
of other chapters, it shows every solution, and no captions. So on its way to JupyterLab a notebook
is changed: citations and numbers are written out, links lead to files, code that only draws is
folded, captions stand below the figures, each exercise has a cell to work in, and each solution is
a section that is closed. On its way back all of this is undone; what a reader has written stays.

`shown` and `kept` are the two ways; `kept(shown(notebook))` is the notebook.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbformat import NotebookNode
from pybtex.database import parse_file

BOOK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BOOK / "_ext"))
from citations import names, tell_apart  # noqa: E402

KEPT_LANGUAGE = {"name": "python"}
KEPT_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FOLDED = {"hide-input", "hide-cell", "remove-cell", "remove-input"}
COLLAPSED = "jp-MarkdownHeadingCollapsed"
TO_WORK_IN = "# your turn"
ROLE = re.compile(r"\{(cite:p|cite:t|eq|numref|ref)\}`([^`]+)`")
WRITTEN_OUT = re.compile(r'<span data-role="([\w:]+)" data-of="([^"]+)">.*?</span>', re.DOTALL)
SOLUTION = re.compile(r"```\{solution-start\} [\w-]+\n.*?```", re.DOTALL)
CLOSED = re.compile(r"#### Solution\n\n<!--\n(```\{solution-start\}.*?)\n-->", re.DOTALL)
EXERCISE = re.compile(r"```\{exercise\}.*?\n:label: ([\w-]+)", re.DOTALL)
OPENED = "#### Exercise\n\n"


def shown(notebook: NotebookNode, page: str) -> NotebookNode:
    """Return a chapter as JupyterLab is to show it.

    Args:
        notebook: the chapter, which is changed.
        page: the name of its file, without the ending.
    """
    notebook.metadata.kernelspec = dict(KEPT_KERNEL, display_name=kernel_name())
    notebook.metadata.language_info = IPythonKernel.language_info
    cells = []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        label = cell.cell_type == "markdown" and EXERCISE.search(cell.source)
        if cell.cell_type == "markdown":
            show_text(cell, page)
        elif FOLDED & set(cell.metadata.get("tags", [])):
            cell.metadata.jupyter = {"source_hidden": True}
        cells.append(cell)
        if label and not is_tagged(following, "work"):
            cells.append(extra("code", f"work-{label[1]}", "work", TO_WORK_IN))
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        if figure.get("caption"):
            text = f"*{numbers()[figure.name]}.* {written_out(figure.caption, page)}"
            cells.append(extra("markdown", f"caption-{cell.id}", "caption", text))
    notebook.cells = cells
    return notebook


def kept(notebook: NotebookNode) -> NotebookNode:
    """Return what `shown` was given, with what a reader has written since."""
    notebook.metadata = NotebookNode(kernelspec=KEPT_KERNEL, language_info=KEPT_LANGUAGE)
    notebook.cells = [cell for cell in notebook.cells if not is_ours(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            keep_text(cell)
        elif FOLDED & set(cell.metadata.get("tags", [])):
            cell.metadata.pop("jupyter", None)
    return notebook


def is_tagged(cell: NotebookNode | None, tag: str) -> bool:
    """Whether a cell has a tag."""
    return cell is not None and tag in cell.metadata.get("tags", [])


def is_ours(cell: NotebookNode) -> bool:
    """Whether `shown` made a cell, and nobody wrote into it."""
    untouched = is_tagged(cell, "work") and cell.source.strip() in ("", TO_WORK_IN)
    return untouched or is_tagged(cell, "caption")


def extra(kind: str, name: str, tag: str, source: str) -> NotebookNode:
    """Return a cell that the file does not have."""
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return make(source, id=name[:64], metadata={"tags": [tag]})


def show_text(cell: NotebookNode, page: str) -> None:
    """Write out what only the book knows, open an exercise, close a solution."""
    text = written_out(cell.source, page)
    if SOLUTION.search(text):
        text = SOLUTION.sub(lambda found: f"#### Solution\n\n<!--\n{found[0]}\n-->", text)
        cell.metadata[COLLAPSED] = True
    if EXERCISE.match(text):
        text = OPENED + text
    cell.source = text


def keep_text(cell: NotebookNode) -> None:
    """Undo `show_text`."""
    text = WRITTEN_OUT.sub(r"{\1}`\2`", CLOSED.sub(r"\1", cell.source.removeprefix(OPENED)))
    cell.source = re.sub(
        r"\]\((\w+)\.(?:ipynb|md)\)",
        lambda found: f"]({found[1]})" if found[1] in files() else found[0],
        text,
    )
    cell.metadata.pop(COLLAPSED, None)


def written_out(text: str, page: str) -> str:
    """Return a text whose citations and numbers can be read without the book around it."""
    text = re.sub(r"\]\((\w+)\)", lambda f: f"]({files().get(f[1], f[1])})", text)
    here = labels_of_equations().get(page, [])

    def write(role: re.Match) -> str:
        kind, target = role.groups()
        if kind == "eq" and target in here:
            return role[0]  # JupyterLab knows the equations of the page itself
        words = cited(kind, target) if kind.startswith("cite") else numbers().get(target, target)
        return f'<span data-role="{kind}" data-of="{target}">{words}</span>'

    return ROLE.sub(write, text)


def cited(kind: str, keys: str) -> str:
    """Return a citation in words, in brackets or as a part of the sentence."""
    works = [
        (names(entry), entry.fields["year"]) for entry in map(literature().get, keys.split(","))
    ]
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
        found[path.stem] = re.findall(r"\$\$ \(([\w-]+)\)", text)
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
            for label in EXERCISE.findall("".join(cell["source"])):
                found[label] = f"Exercise {count('exercise', chapter)}"
    return found


@cache
def kernel_name() -> str:
    """Return what JupyterLab calls the kernel of Python."""
    return KernelSpecManager().get_kernel_spec("python3").display_name


class BookContents(AsyncLargeFileManager):
    """The files as they are, but for the chapters of the book."""

    async def get(self, path, content=True, **options):
        """Return a file; a chapter as JupyterLab is to show it."""
        model = await super().get(path, content=content, **options)
        if content and self._is_chapter(path, model):
            model["content"] = shown(nbformat.from_dict(model["content"]), Path(path).stem)
        return model

    async def save(self, model, path=""):
        """Save a file; a chapter as the files keep it."""
        if "content" in model and self._is_chapter(path, model):
            model["content"] = kept(nbformat.from_dict(model["content"]))
        return await super().save(model, path)

    def _is_chapter(self, path: str, model: dict) -> bool:
        place = Path(self._get_os_path(path.strip("/"))).resolve()
        return model["type"] == "notebook" and place.parent == BOOK
