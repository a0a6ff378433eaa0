"""The chapters as JupyterLab shows them, and as the files keep them.

In JupyterLab a chapter stands alone: it knows neither the literature nor the numbers of figures and
equations, it shows every solution, and no captions. So on its way to JupyterLab a notebook is
changed: citations and numbers are written out, links lead to files, code that only draws is folded,
captions stand below the figures and numbers beside the equations, each exercise has a cell to work
in, and each solution is a section that is closed. On its way back all of this is undone; what a
reader has written stays.

`shown` and `kept` are the two ways; `kept(shown(notebook))` is the notebook.
"""

import re
import sys
from functools import cache
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "_ext"))
from standalone import (
    BOOK,
    COLLAPSED,
    EQUATION,
    FOLDED,
    LABEL,
    ROLE,
    SOLUTION,
    TO_WORK_IN,
    files,
    is_tagged,
    numbered,
    numbers,
    with_extras,
    words_for,
)

KEPT_LANGUAGE = {"name": "python"}
KEPT_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NUMBERED = re.compile(r" \\tag\{([\d.]+)\}\n\$\$")
WRITTEN_OUT = re.compile(r'<span data-role="([\w:]+)" data-of="([^"]+)">.*?</span>', re.DOTALL)
CLOSED = re.compile(r"#### Solution\n\n<!--\n(```\{solution-start\}.*?)\n-->", re.DOTALL)
OPENED = "#### Exercise\n\n"


def shown(notebook: NotebookNode, page: str) -> NotebookNode:
    """Return a chapter as JupyterLab is to show it.

    Args:
        notebook: the chapter, which is changed.
        page: the name of its file, without the ending.
    """
    notebook.metadata.kernelspec = dict(KEPT_KERNEL, display_name=kernel_name())
    notebook.metadata.language_info = IPythonKernel.language_info
    notebook.cells = with_extras(notebook.cells, page)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            show_text(cell)
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


def is_ours(cell: NotebookNode) -> bool:
    """Whether `shown` made a cell, and nobody wrote into it."""
    untouched = is_tagged(cell, "work") and cell.source.strip() in ("", TO_WORK_IN)
    return untouched or is_tagged(cell, "caption")


def show_text(cell: NotebookNode) -> None:
    """Write out what only the book knows, open an exercise, close a solution."""
    text = written_out(cell.source)
    if SOLUTION.search(text):
        text = SOLUTION.sub(lambda found: f"#### Solution\n\n<!--\n{found[0]}\n-->", text)
        cell.metadata[COLLAPSED] = True
    if LABEL.match(text):
        text = OPENED + text
    cell.source = text


def keep_text(cell: NotebookNode) -> None:
    """Undo `show_text`."""
    text = WRITTEN_OUT.sub(r"{\1}`\2`", CLOSED.sub(r"\1", cell.source.removeprefix(OPENED)))
    labels = {number: label for label, number in numbers().items()}
    text = NUMBERED.sub(
        lambda found: f"\n$$ ({label})" if (label := labels.get(f"({found[1]})")) else found[0],
        text,
    )
    cell.source = re.sub(
        r"\]\((\w+)\.(?:ipynb|md)\)",
        lambda found: f"]({found[1]})" if found[1] in files() else found[0],
        text,
    )
    cell.metadata.pop(COLLAPSED, None)


def written_out(text: str) -> str:
    """Return a text whose citations and numbers can be read without the book around it."""
    text = re.sub(r"\]\((\w+)\)", lambda f: f"]({files().get(f[1], f[1])})", text)
    text = EQUATION.sub(numbered, text)

    def write(role: re.Match) -> str:
        kind, target = role.groups()
        return f'<span data-role="{kind}" data-of="{target}">{words_for(kind, target)}</span>'

    return ROLE.sub(write, text)


@cache
def kernel_name() -> str:
    """Return what JupyterLab calls the kernel of Python."""
    return KernelSpecManager().get_kernel_spec("python3").display_name


class BookContents(AsyncLargeFileManager):
    """The files as they are, but for the chapters of the book.

    What a chapter has printed and drawn is trusted: so figures with a slider are there before it is
    run.
    """

    async def get(self, path, content=True, **options):
        """Return a file; a chapter as JupyterLab is to show it."""
        model = await super().get(path, content=content, **options)
        if content and self._is_chapter(path, model["type"]):
            model["content"] = shown(nbformat.from_dict(model["content"]), Path(path).stem)
        return model

    async def save(self, model, path=""):
        """Save a file; a chapter as the files keep it."""
        if "content" in model and self._is_chapter(path, model["type"]):
            model["content"] = kept(nbformat.from_dict(model["content"]))
        return await super().save(model, path)

    def mark_trusted_cells(self, nb, path=""):
        """Mark the cells whose output may be shown as it is."""
        if self._is_chapter(path, "notebook"):
            self.notary.mark_cells(nb, trusted=True)
        else:
            super().mark_trusted_cells(nb, path)

    def _is_chapter(self, path: str, kind: str) -> bool:
        place = Path(self._get_os_path(path.strip("/"))).resolve()
        return kind == "notebook" and place.parent == BOOK
