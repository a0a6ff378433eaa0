"""The chapters in JupyterLab: what is changed for it is undone, and nothing in them is broken."""

import asyncio
import contextlib
import copy
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_lab"))
sys.path.insert(0, str(ROOT / "book/_ext"))
import book_contents as lab  # noqa: E402
import standalone  # noqa: E402
import whole_book  # noqa: E402

BROWSER = whole_book.find_chromium()
WARNINGS = ".text-yellow-600, .text-orange-600, .text-red-500"  # of MyST in JupyterLab
CHAPTER = "01_state_space_models"  # with sliders, soon run, and nothing in it is timed

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
EACH_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


@EACH_NOTEBOOK
def test_what_is_shown_is_kept(path):
    notebook = read(path)
    shown = lab.shown(copy.deepcopy(notebook), path.stem)
    nbformat.validate(shown)
    assert lab.kept(shown) == notebook


def test_sliders_are_there_before_anything_is_run(tmp_path):
    manager = lab.BookContents(root_dir=str(ROOT), parent=None)
    opened = asyncio.run(manager.get(f"book/{CHAPTER}.ipynb"))["content"]
    assert all(cell.metadata.trusted for cell in opened.cells if cell.get("outputs"))
    other = tmp_path / "other.ipynb"
    other.write_text(Path(ROOT / f"book/{CHAPTER}.ipynb").read_text("utf-8"), "utf-8")
    manager = lab.BookContents(root_dir=str(tmp_path), parent=None)
    opened = asyncio.run(manager.get(other.name))["content"]
    assert not any(cell.metadata.trusted for cell in opened.cells if cell.get("outputs"))


@EACH_NOTEBOOK
def test_shown_chapters_need_no_book(path):
    notebook = read(path)
    cells = lab.shown(read(path), path.stem).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not lab.ROLE.search(text)
    own = standalone.labels_of_equations()[path.stem]
    numbers = [f"({number})" for number in re.findall(r"\\tag\{([\d.]+)\}", text)]
    assert numbers == [standalone.numbers()[label] for label in own]
    for name in {"fig-", "ex-", "eq-"}:
        assert f">{name}" not in text  # each has its number
    captions = [cell for cell in cells if lab.is_tagged(cell, "caption")]
    assert len(captions) == sum("mystnb" in cell.metadata for cell in notebook.cells)


@EACH_NOTEBOOK
def test_exercises_have_a_cell_to_work_in_and_solutions_are_closed(path):
    cells = lab.shown(read(path), path.stem).cells
    exercises = [i for i, cell in enumerate(cells) if cell.source.startswith(lab.OPENED)]
    assert exercises or path.stem == "common_errors"
    for i in exercises:
        work, solution = cells[i + 1 : i + 3]
        assert (work.source, work.outputs) == (lab.TO_WORK_IN, [])
        assert solution.source.startswith("#### Solution")
        assert solution.metadata[lab.COLLAPSED]


@EACH_NOTEBOOK
def test_notebooks_to_take_along_are_plain_markdown(path):
    before, after = read(path), standalone.alone(read(path), path.stem, "https://x.org/")
    nbformat.validate(after)
    for cell in after.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"```\{|\{[\w:]+\}`|\]\(\w+\)|\$\$ \(eq", cell.source), cell.source
    card = after.cells[0].source
    assert path.stem == "common_errors" or ("**Before.** " in card and "**Running time.** " in card)
    code = [cell.source for cell in before.cells if cell.cell_type == "code"]
    kept = [c.source for c in after.cells if c.cell_type == "code" and not lab.is_tagged(c, "work")]
    assert kept == code
    tags = [n for cell in after.cells for n in re.findall(r"\\tag\{([\d.]+)\}", cell.source)]
    assert len(tags) == len(standalone.labels_of_equations()[path.stem])


def test_what_a_reader_writes_is_kept():
    path = ROOT / "book/03_two_views.ipynb"
    shown = lab.shown(read(path), path.stem)
    work = next(cell for cell in shown.cells if lab.is_tagged(cell, "work"))
    work.source = "print(1)"
    kept = lab.kept(shown)
    assert work in kept.cells
    again = lab.shown(kept, path.stem)
    assert sum(cell.id == work.id for cell in again.cells) == 1
    nbformat.validate(again)


def test_numbers_and_citations_are_those_of_the_book():
    assert standalone.numbers()["eq-impulse"] == "(1.10)"
    assert standalone.numbers()["fig-cost"] == "Figure 3.5"
    assert (
        standalone.cited("cite:p", "gu2022s4,gu2023mamba") == "(Gu et al., 2022a; Gu and Dao, 2023)"
    )
    assert standalone.cited("cite:t", "gu2022s4d") == "Gu et al. (2022b)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab on a copy of the book; its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--IdentityProvider.token=", "--LabApp.news_url="]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.check_for_updates_class="
                "jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    settings = {**os.environ, "JUPYTER_CONFIG_PATH": str(folder / "book/_lab")}
    settings |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_DATA_DIR": str(folder / "data"),
    }
    settings["JUPYTER_PATH"] = str(Path(sys.prefix) / "share/jupyter")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/status"):
            break
        time.sleep(0.5)
    yield address, folder / "book"
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def lab_page(server):
    """A chapter in JupyterLab, opened and not yet run."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened(browser, server, CHAPTER)
        browser.close()


def opened(browser, server, name):
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.goto(f"{server[0]}/lab/tree/book/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .myst h1", timeout=120_000)
    page.wait_for_timeout(3000)
    return page


def walk(page):
    """Scroll through the notebook: only what is near the window is drawn."""
    panel = page.locator(".jp-WindowedPanel-outer").first
    height = panel.evaluate("e => e.scrollHeight")
    for top in range(0, height + 1200, 1200):
        panel.evaluate("(e, top) => { e.scrollTop = top }", top)
        page.wait_for_timeout(400)
        yield


def run_all(page):
    # without a kernel nothing is run, and on a busy machine one takes a while to start
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status"
        " === 'idle'", timeout=120_000
    )  # fmt: skip
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(
        "() => {"
        "  const {sessionContext, content} = window.jupyterapp.shell.currentWidget;"
        "  const cells = content.widgets.map((widget) => widget.model)"
        "    .filter((cell) => cell.type === 'code' && cell.sharedModel.source.trim());"
        "  const failed = cells.some((cell) => cell.sharedModel.outputs"
        "    .some((output) => output.output_type === 'error'));"
        "  return failed || (sessionContext.session?.kernel?.status === 'idle'"
        "    && cells.every((cell) => cell.executionCount));"
        "}", timeout=240_000
    )  # fmt: skip


def first_slider(page):
    """Scroll to the first figure with a slider."""
    for _ in walk(page):
        figure = page.locator(".mamba-slider").first
        if figure.count():
            return figure
    raise AssertionError("there is no slider")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium and no Chrome is here")
def test_a_chapter_opens_runs_and_is_saved_in_jupyterlab(server, lab_page):
    page = lab_page
    assert page.locator(".jp-mod-dirty").count() == 0
    folded, hidden, numbers = 0, 0, set()
    for _ in walk(page):
        assert (
            page.locator(".jp-Notebook .text-yellow-600, .jp-Notebook .text-red-500").count() == 0
        )
        folded = max(folded, page.locator(".jp-InputPlaceholder:visible").count())
        hidden = max(hidden, page.locator(".jp-showHiddenCellsButton:visible").count())
        numbers |= set(page.locator(".jp-Notebook .katex-html .tag").all_inner_texts())
    assert folded > 0
    assert hidden > 0
    labels = standalone.labels_of_equations()[CHAPTER]
    assert {standalone.numbers()[label] for label in labels} <= numbers
    runs_and_is_saved(page, server, CHAPTER)


def runs_and_is_saved(page, server, name):
    run_all(page)
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(2000)
    before, after = (read(folder / f"{name}.ipynb") for folder in (ROOT / "book", server[1]))
    assert [cell.source for cell in after.cells] == [cell.source for cell in before.cells]
    assert after.metadata == before.metadata
    outputs = [output for cell in after.cells if "outputs" in cell for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error"]
    assert not errors, errors[0].evalue


@pytest.mark.lab
@pytest.mark.skipif(BROWSER is None, reason="no Chromium and no Chrome is here")
@EACH_NOTEBOOK
def test_every_notebook_runs_in_jupyterlab(server, lab_page, path):
    page = opened(lab_page.context.browser, server, path.stem)
    runs_and_is_saved(page, server, path.stem)
    page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll()")
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium and no Chrome is here")
def test_sliders_take_the_keyboard_in_jupyterlab(lab_page):
    """After a run they are drawn; an arrow moves them, and not the cells."""
    figure = first_slider(lab_page)
    if not figure.locator("output").inner_text():  # no test before this one has run the notebook
        run_all(lab_page)
        figure = first_slider(lab_page)
    active = "window.jupyterapp.shell.currentWidget.content.activeCellIndex"
    figure.locator("input").focus()
    before, cell = figure.locator("output").inner_text(), lab_page.evaluate(active)
    for _ in range(2):
        lab_page.keyboard.press("ArrowLeft")
    assert figure.locator("output").inner_text() != before
    assert lab_page.evaluate(active) == cell
