"""The book as a reader meets it: complete, executed in order, self-contained, and linked."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pybtex.database
import pytest
import yaml
from pypdf import PdfReader

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import whole_book  # noqa: E402

BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
EACH_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def toc_pages():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [toc["root"]]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            pages += [chapter["file"], *(page["file"] for page in chapter.get("sections", []))]
    return pages


def test_toc_and_book_agree():
    written = {f"book/{path.stem}" for path in [*NOTEBOOKS, *BOOK.glob("*.md")] if path.is_file()}
    assert set(toc_pages()) == written
    chapters = [page for page in toc_pages() if re.match(r"book/\d\d_[a-z]", page)]
    pages = [page for page in toc_pages() if re.match(r"book/\d\d_\d_", page)]
    assert (chapters, pages) == (sorted(chapters), sorted(pages))


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@EACH_NOTEBOOK
def test_notebook_is_executed_in_order_without_errors(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")


@EACH_NOTEBOOK
def test_notebook_installs_the_package_only_where_it_is_missing(path):
    first = code_cells(path)[0]
    assert first.metadata["tags"] == ["remove-cell"]
    assert first.source == code_cells(NOTEBOOKS[0])[0].source
    assert "except ModuleNotFoundError" in first.source
    assert f'"mamba-tutorial[notebooks] @ git+{REPOSITORY}"' in first.source


@EACH_NOTEBOOK
def test_notebook_holds_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "mystnb"}
    assert not re.search(r"/home/|/Users/|/root/|/tmp/|site-packages", path.read_text())


@EACH_NOTEBOOK
def test_cells_are_short(path):
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 30


@EACH_NOTEBOOK
def test_pictures_have_a_caption_and_a_text_for_those_who_cannot_see(path):
    for cell in code_cells(path):
        shown = [(k, "".join(v)) for o in cell.outputs for k, v in o.get("data", {}).items()]
        kinds = {kind for kind, data in shown if not data.startswith("<table")}  # which is text
        assert "image/png" not in kinds  # drawings are sharp on every screen
        if kinds & {"image/svg+xml", "text/html"}:
            assert len(cell.metadata["mystnb"]["figure"]["caption"]) > 40
            assert "hide-input" in cell.metadata["tags"]
        if "image/svg+xml" in kinds:
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 40


@EACH_NOTEBOOK
def test_type_in_pictures_can_be_read_on_a_phone(path):
    """9 pixels high at least where the picture is 350 pixels wide, but for exponents and the like.

    matplotlib writes a text as outlines of a hundred units, scaled to its size.
    """
    for cell in code_cells(path):
        for output in cell.outputs:
            drawing = output.get("data", {}).get("image/svg+xml", "")
            if drawing:
                width = float(re.search(r'viewBox="0 0 ([\d.]+)', drawing)[1])
                sizes = [float(s) for s in re.findall(r"scale\(([\d.]+) -[\d.]+\)", drawing)]
                assert 100 * min(sizes) * 350 / width >= 9, cell.source


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem[0].isdigit()], ids=lambda p: p.stem
)
def test_exercises_have_tested_solutions(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells)
    exercises = re.findall(r":label: (ex-[\w-]+)", text)
    assert (2 if re.match(r"\d\d_\d_", path.stem) else 3) <= len(exercises) <= 5
    for exercise in exercises:
        starts = [i for i, c in enumerate(cells) if f"{{solution-start}} {exercise}\n" in c.source]
        assert len(starts) == 1
        ends = [i for i, c in enumerate(cells) if "{solution-end}" in c.source and i > starts[0]]
        solution = cells[starts[0] : ends[0]]
        assert ":class: dropdown" in solution[0].source
        assert any("assert" in c.source for c in solution if c.cell_type == "code")


def table(title):
    """The rows of the table under a heading of the notation page, as lists of cells."""
    section = (
        (BOOK / "notation.md").read_text("utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    )
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def text_of_chapter(number):
    paths = sorted(BOOK.glob(f"{number:02}_*.ipynb"))
    cells = [cell for path in paths for cell in nbformat.read(path, as_version=4).cells]
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_every_symbol_of_the_notation_is_used():
    text = "\n".join(text_of_chapter(number) for number in range(1, 11))
    for title in ("The model", "The selective model", "Around the model"):
        for row in table(title):
            for symbol in re.findall(r"\$([^$]+)\$", row[0]):
                core = symbol.split("=")[0].strip()
                assert core in text or core.replace(" ", "") in text.replace(" ", ""), symbol


def test_letters_with_two_meanings_are_used_where_the_notation_says():
    commands = {"tilde": r"\tilde", "bar": r"\bar"}
    for letter, *meanings in table("Letters that mean two things"):
        pattern = commands.get(letter) or letter.strip("$")
        for numbers in re.findall(r"chapters? (\d+)(?: and (\d+))?", " ".join(meanings)):
            for number in filter(None, numbers):
                text = text_of_chapter(int(number)).replace("$$", "$")
                formulae = re.findall(r"\$[^$]+\$", text)
                assert any(pattern in formula for formula in formulae), (letter, number)


def test_every_work_of_the_literature_has_an_address():
    entries = pybtex.database.parse_file(BOOK / "references.bib").entries
    assert len(entries) >= 30
    for key, entry in entries.items():
        assert {"doi", "eprint", "url"} & set(entry.fields), key


@pytest.mark.slow
def test_citations_are_told_apart_and_stand_in_the_list(site):
    page = (site / "book/references.html").read_text("utf-8")
    works = page.split('<div class="citation"')[1:]
    labels = [re.search(r"\[</span>(.*?)<span", work)[1] for work in works]
    assert len(works) == len(set(labels)) > 20
    assert {"Gu et al., 2022a", "Gu et al., 2022b", "Gu and Dao, 2023"} <= set(labels)
    assert all('class="reference external" href="https://' in work for work in works)
    known = dict(zip([re.search('id="([^"]+)"', work)[1] for work in works], labels, strict=True))
    for path in NOTEBOOKS:
        html = (site / f"book/{path.stem}.html").read_text("utf-8")
        for key, text in re.findall(r'references\.html#([\w-]+)"[^>]*>(?:<span>)?(.*?)</a>', html):
            text = re.sub("<[^>]+>", "", text)
            assert known[key].endswith(text), (path.stem, text)


class Page(HTMLParser):
    """The addresses that a page loads by itself, those it links to, and its anchors."""

    LOADS = ("script", "img", "iframe", "audio", "video", "source", "embed")

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.missing_alt = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag in self.LOADS and attributes.get("src"):
            self.loads.append(attributes["src"])
        relation = attributes.get("rel", "")
        if tag == "link" and re.search("stylesheet|icon|load|fetch|connect|manifest", relation):
            self.loads.append(attributes["href"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img" and not attributes.get("alt"):
            self.missing_alt.append(attributes.get("src"))


@pytest.fixture(scope="module")
def pages(site):
    # _static holds a template of the theme that is no page
    paths = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    return {path.resolve(): Page(path) for path in paths}


@pytest.mark.slow
def test_every_page_is_built(site):
    for page in toc_pages():
        assert (site / f"{page}.html").is_file()


@pytest.mark.slow
def test_every_chapter_opens_with_its_drawing(site):
    chapters = [page for page in toc_pages() if re.match(r"book/\d\d_", page)]
    assert len(chapters) > 20
    for page in chapters:
        html = (site / f"{page}.html").read_text("utf-8")
        card = html.index("chapter-card")
        assert card < html.index('class="card-drawing"') < html.index("Running time", card)


@pytest.mark.slow
def test_no_page_loads_anything_from_outside(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            parts = urlsplit(address)
            assert parts.scheme + parts.netloc == "", f"{path.name} loads {address}"
            assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: no {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)[\"']?(https?:)?//", style.read_text("utf-8")), (
            style
        )


@pytest.mark.slow
def test_progress_bars_stay_in_the_notebooks(site):
    bar = r"\d+%\|[#\d ]+\|"
    assert sum(bool(re.search(bar, path.read_text("utf-8"))) for path in NOTEBOOKS) > 2
    for page in toc_pages():
        assert not re.search(bar, (site / f"{page}.html").read_text("utf-8")), page


@pytest.mark.slow
def test_pages_say_what_they_are(site):
    pictures = {}
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    for page in toc_pages():
        html = (site / f"{page}.html").read_text("utf-8")
        assert len(re.search('<meta name="description" content="([^"]+)"', html)[1]) > 40
        assert re.search('<meta property="og:title" content="[^"]+"', html)
        assert re.search('<meta property="og:description" content="[^"]+"', html)
        picture = re.search('<meta property="og:image" content="([^"]+)"', html)[1]
        address = f"https://{owner}.github.io/{name}/"
        assert picture.startswith(address)
        pictures[page] = (site / picture.removeprefix(address)).read_bytes()
    of_chapters = [pictures[page] for page in pictures if re.match(r"book/\d\d_", page)]
    assert len(set(of_chapters)) == len(of_chapters) > 20
    for picture in of_chapters:  # a PNG tells its width and height at its beginning
        assert picture.startswith(b"\x89PNG")
        assert [int.from_bytes(picture[i : i + 4], "big") for i in (16, 20)] == [1200, 630]
        assert len(picture) < 100e3
    assert not (site / "genindex.html").exists()


@pytest.mark.slow
def test_the_one_style_sheet_holds_what_was_written_last(site):
    """The theme writes its colours of code when all else is done; they must not be missed."""
    style = (site / "_static/site.css").read_text("utf-8")
    for wanted in (
        'html[data-theme="dark"] .highlight .k',
        ".fa-magnifying-glass",
        ".chapter-card",
    ):
        assert wanted in style
    assert "fontawesome" not in style
    assert not list((site / "_static").rglob("*fontawesome*"))


def test_each_common_error_is_followed_by_a_cell_that_can_fail():
    cells = nbformat.read(ROOT / "book/common_errors.ipynb", as_version=4).cells
    errors = [i for i, cell in enumerate(cells) if "\n### " in f"\n{cell.source}"]
    assert len(errors) >= 18
    for i in errors:
        assert cells[i].source.count("### ") == 1
        assert cells[i + 1].cell_type == "code"
        assert "assert" in cells[i + 1].source


@pytest.mark.slow
def test_texts_of_the_search_hold_no_tex(site):
    script = (site / "_static/search_texts.js").read_text("utf-8")
    texts = json.loads(script.removeprefix("window.searchTexts = ").removesuffix(";\n"))
    assert set(texts) == set(toc_pages())
    for page, sections in texts.items():
        html = (site / f"{page}.html").read_text("utf-8")
        for place, text in sections:
            assert not re.search(r"\\(\(|\)|frac|bar|Delta|mathrm|begin|left|right)", text), page
            assert not place or f'id="{place}"' in html, (page, place)
    assert any("B̄ = Δ B" in text for _, text in texts["book/02_discretisation"])


@pytest.mark.slow
def test_the_whole_book_has_all_pages_in_order(site):
    page = whole_book.whole_book(site, ROOT)
    names = [Path(name).name for name in toc_pages()]
    places = [page.index(f'id="{name}--"') for name in names]
    assert places == sorted(places)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


@pytest.mark.slow
@pytest.mark.skipif(whole_book.find_chromium() is None, reason="no Chromium and no Chrome is here")
def test_the_pdf_has_all_pages(site, tmp_path):
    """All pages of the book are printed, of each page its title: the whole takes a minute."""
    small, titles = tmp_path / "html", []
    (small / "book").mkdir(parents=True)
    for folder in ("_static", "mathjax"):
        shutil.copytree(site / folder, small / folder)
    for page in toc_pages():
        html = (site / f"{page}.html").read_text("utf-8")
        head, title = html.partition("<body")[0], re.search(r"<h1>.*?</h1>", html, re.DOTALL)[0]
        text = f'{head}<body><article class="bd-article">{title}</article><section id="the-map">'
        (small / f"{page}.html").write_text(text, "utf-8")
        titles.append(re.sub("<[^>]*>|#", "", title).strip())
    whole_book.main(small, ROOT)
    printed = (small / whole_book.NAME).read_bytes()
    assert printed.startswith(b"%PDF")
    reader = PdfReader(small / whole_book.NAME)
    at = {
        item.title: reader.get_destination_page_number(item) + 1
        for item in reader.outline
        if not isinstance(item, list)
    }
    assert set(titles) <= set(at)
    contents = {line for page in reader.pages[1:3] for line in page.extract_text().splitlines()}
    assert {f"{title} {at[title]}" for title in titles[1:]} <= contents  # all but the front page
    assert "the whole book as one PDF" in (small / "book/index.html").read_text("utf-8")


@pytest.mark.slow
def test_folded_code_that_stands_together_has_one_fold(site):
    fold = r'<div class="cell [^"]*">\s*<details class="admonition hide above-input">'
    alone = rf"{fold}(?:(?!</details>).)*</details>\s*</div>\s*"  # and nothing printed
    folds = 0
    for path in NOTEBOOKS:
        html = (site / "book" / f"{path.stem}.html").read_text("utf-8")
        assert not re.search(alone + fold, html, re.DOTALL), path
        folds += len(re.findall(fold, html))
    assert folds > 200


@pytest.mark.slow
def test_every_inner_link_leads_somewhere(pages):
    for path, page in pages.items():
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} links to {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {address}"


@pytest.mark.slow
def test_every_picture_has_an_alternative_text(pages):
    for path, page in pages.items():
        assert not page.missing_alt, f"{path.name}: {page.missing_alt}"


@pytest.mark.slow
def test_chapters_can_be_launched_edited_and_discussed(site):
    for path in NOTEBOOKS:
        html = (site / "book" / f"{path.stem}.html").read_text("utf-8")
        github = REPOSITORY.removeprefix("https://github.com/")
        source = f"blob/main/book/{path.name}"
        assert f"https://colab.research.google.com/github/{github}/{source}" in html
        assert f"https://mybinder.org/v2/gh/{github}/main" in html
        assert f"{REPOSITORY}/edit/main/book/{path.name}" in html
        assert f"{REPOSITORY}/issues/new" in html


@pytest.mark.slow
def test_chapters_can_be_downloaded_as_notebooks(site):
    for path in NOTEBOOKS:
        html = (site / f"book/{path.stem}.html").read_text("utf-8")
        address = re.search(r'<a href="([^"]+)"[^>]*btn-download-source-button', html)[1]
        assert re.search(r"this page as a notebook \(\.ipynb\)", html)
        file = (site / "book" / address).resolve()
        assert len(nbformat.read(file, as_version=4).cells) >= len(
            nbformat.read(path, as_version=4).cells
        )
        assert file.stat().st_size < 1.2e6


@pytest.mark.slow
def test_the_map_leads_to_every_chapter(site, pages):
    links = pages[(site / "book" / "index.html").resolve()].links
    for path in NOTEBOOKS:
        assert f"{path.stem}.html" in links
