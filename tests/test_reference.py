"""The reference and the glossary: complete, true to the code, and linked from the chapters."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import mamba_tutorial

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import public_names  # noqa: E402
import reference  # noqa: E402

PAGES = sorted((ROOT / "book").glob("reference_*.md"))
CHAPTERS = sorted((ROOT / "book").glob("[0-9]*.ipynb"))
TERM = re.compile(r"^(\S.*)\n  (.+)$", re.M)
GLOSSARY = TERM.findall((ROOT / "book/glossary.md").read_text("utf-8").split(":sorted:")[1])


def listed(page):
    """The modules that a page of the reference names, each with its chapter."""
    text = page.read_text("utf-8")
    return yaml.safe_load(re.search(r"```\{reference\}\n(.*?)```", text, re.S)[1])


def public():
    """The public names of the package, found by importing it: (name, object)."""
    walk = pkgutil.walk_packages(mamba_tutorial.__path__, "mamba_tutorial.")
    for name in ["mamba_tutorial", *(found.name for found in walk)]:
        if re.search(r"\._", name):
            continue
        module = importlib.import_module(name)
        own = [key for key, value in vars(module).items() if is_own(key, value, name)]
        for key in dict.fromkeys([*getattr(module, "__all__", own), *own]):
            yield name, key, getattr(module, key)


def is_own(key, value, module):
    value = getattr(value, "fn", value)  # a kernel is an object around its function
    kinds = inspect.isfunction(value) or inspect.isclass(value)
    return kinds and not key.startswith("_") and value.__module__ == module


def test_every_public_name_is_explained():
    explained = public_names.all_entries()
    for module, key, _ in public():
        entry = explained.get(public_names.definition(f"{module}.{key}"))
        assert entry is not None, f"{module}.{key}"
        assert entry.doc or entry.kind == "data", f"{module}.{key}"


def test_every_module_has_its_page():
    pages = [listed(page) for page in PAGES]
    for name, module in public_names.modules().items():
        if module.entries:
            found = [page for page in pages if reference.listed_for(name, page)]
            assert len(found) == 1, f"{name} belongs on one page of book/reference_*.md"
    for page in pages:
        for name, chapter in page.items():
            assert f"mamba_tutorial.{name}" in public_names.modules()
            assert list((ROOT / "book").glob(f"{chapter}.*")), chapter


def test_calls_are_those_of_the_code():
    for module, key, value in public():
        if inspect.isfunction(value):
            entry = public_names.all_entries()[public_names.definition(f"{module}.{key}")]
            taken = inspect.signature(inspect.unwrap(value)).parameters
            written = re.sub(r'"[^"]*"|\[[^]]*\]', "", entry.signature.partition("(")[2])
            for name in taken:
                assert re.search(rf"(^|\s|\*){name}\b", written), (entry.name, name)


def test_the_reference_needs_no_library():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "book/_ext")!r})
for name in ("torch", "triton", "jaxtyping", "numpy"):
    sys.modules[name] = None  # an import of it fails
import public_names
assert len(public_names.all_entries()) > 300
assert "mamba_tutorial" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def text_of(page):
    if page.suffix == ".md":
        return page.read_text("utf-8")
    cells = nbformat.read(page, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize(("term", "meaning"), GLOSSARY, ids=[term for term, _ in GLOSSARY])
def test_a_term_is_used_where_the_glossary_says(term, meaning):
    pages = re.findall(r"\]\((\w+)\)", meaning)
    assert pages
    assert meaning.endswith(")")
    if pages[0].startswith("reference"):
        return
    first = "floor" if term == "occupancy" else re.split(r"[ Δ⊕]", term)[0][:7]
    for page in pages:
        (path,) = (ROOT / "book").glob(f"{page}.*")
        assert re.search(re.escape(first), text_of(path), re.I), page


def test_the_glossary_has_one_meaning_for_each_term():
    terms = [term for term, _ in GLOSSARY]
    assert len(terms) == len(set(terms)) >= 40


@pytest.mark.slow
def test_every_public_name_has_an_entry_on_the_page(site):
    pages = "".join((site / f"book/{page.stem}.html").read_text("utf-8") for page in PAGES)
    ids = re.findall(r'id="(mamba_tutorial\.[\w.]+)"', pages)
    assert len(ids) == len(set(ids))
    overview = (site / "book/reference.html").read_text("utf-8")
    for module, key, _ in public():
        name = public_names.definition(f"{module}.{key}")
        assert name in ids
        assert f'#{name}"' in overview


@pytest.mark.slow
def test_chapters_lead_to_the_reference(site):
    for path in CHAPTERS:
        html = (site / f"book/{path.stem}.html").read_text("utf-8")
        text, used = html.split("Package functions used on this page", 1)
        for name in public_names.names_used(path):
            assert name.startswith("mamba_tutorial.plotting") or f'#{name}"' in used
        assert "reference_measure.html#mamba_tutorial.benchmark." not in text
    seventh = (site / "book/07_selection.html").read_text("utf-8")
    target = 'href="reference_models.html#mamba_tutorial.selective.selective_scan"'
    assert seventh.count(target) > 1  # in the text, and at its end
