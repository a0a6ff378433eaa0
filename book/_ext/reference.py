"""The reference pages, made of the package's docstrings, and the links that lead to them.

    ```{reference}            the modules of a page, each with its chapter
    scan: 08_parallel_scan
    ```
    ```{reference-index}      all public names, by module
    ```

A module brings the modules inside it along. The first time that a section of any page names a
function, a class or a module in `code`, the name leads to its entry.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import public_names
from public_names import PACKAGE, Entry, Module

HEADS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Raises": "Raises",
    "Returns": "Returns",
    "Yields": "Yields",
}
SECTION = re.compile(rf"({'|'.join(HEADS)}):\n")


class Reference(SphinxDirective):
    """Explain the modules that the body names."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return a section for each module."""
        chapters = yaml.safe_load("\n".join(self.content))
        self.uses = uses_of_chapters(self.env)
        for page in Path(self.env.srcdir, "book").glob("*.ipynb"):
            self.env.note_dependency(str(page))
        sections = []
        for name, chapter in chapters.items():
            for module in public_names.modules().values():
                if listed_for(module.name, chapters) == name:
                    self.env.note_dependency(str(public_names.tree(module.name)[1]))
                    sections.append(self._module(module, chapter))
        return sections

    def _module(self, module: Module, chapter: str) -> nodes.section:
        section = self._section(module.name, module.name.removeprefix(f"{PACKAGE}."), "module")
        section += explained(module.doc, module.name)
        section += self._where([chapter], module.path, None)
        section += [self._entry(module, entry, chapter) for entry in module.entries]
        return section

    def _entry(self, module: Module, entry: Entry, chapter: str) -> nodes.section:
        section = self._section(entry.name, entry.short, entry.kind)
        section += call(entry.signature)
        section += self._where(self.uses.get(entry.name, [chapter]), entry.path, entry.lines)
        section += explained(entry.doc, module.name)
        for member in entry.members:
            part = self._section(member.name, f"{entry.short}.{member.short}", member.kind)
            part += call(member.signature)
            part += explained(member.doc, module.name)
            section += part
        return section

    def _section(self, name: str, title: str, kind: str) -> nodes.section:
        domain = self.env.get_domain("py")
        domain.note_object(name, kind, name, location=self.get_location())
        heading = nodes.title("", "", nodes.literal("", title))
        return nodes.section("", heading, ids=[name], classes=["reference-entry"])

    def _where(self, pages: list[str], path: str, lines: tuple[int, int] | None) -> nodes.Node:
        """Return the line that names the chapters and the source."""
        line = nodes.paragraph(classes=["reference-where"])
        for i, page in enumerate(pages):
            line += nodes.Text(", " if i else "")
            uri = self.env.app.builder.get_relative_uri(self.env.docname, f"book/{page}")
            words = chapter_name(page)
            line += nodes.reference("", words, internal=True, refuri=uri)
        options = self.config.html_theme_options
        uri = f"{options['repository_url']}/blob/{options['repository_branch']}/{path}"
        uri += f"#L{lines[0]}-L{lines[1]}" if lines else ""
        line += [nodes.Text(" · "), nodes.reference("", path, internal=False, refuri=uri)]
        return line


class index_of_all(nodes.General, nodes.Element):
    """Where the list of all names will be, once they are known."""


class ReferenceIndex(SphinxDirective):
    """List all public names by module."""

    def run(self) -> list[nodes.Node]:
        """Return a place for the list."""
        self.env.note_reread()  # for names written since the last build
        return [index_of_all()]


def listed_for(module: str, names: Iterable[str]) -> str | None:
    """Return that of the names, of modules and packages, which lies nearest above a module."""
    above = [name for name in names if f"{module}.".startswith(f"{PACKAGE}.{name}.")]
    return max(above, key=len, default=None)


def chapter_name(page: str) -> str:
    """Return what a page of the book is called in a sentence."""
    number = re.match(r"(\d\d)_(?:(\d)_)?", page)
    if number is None:
        return page.replace("_", " ").capitalize()
    return f"Chapter {int(number[1])}" + (f".{number[2]}" if number[2] else "")


def uses_of_chapters(env) -> dict[str, list[str]]:
    """Return which notebooks use a name, in the order of the book."""
    found = {}
    for path in sorted(Path(env.srcdir, "book").glob("*.ipynb")):
        for name in public_names.names_used(path):
            found.setdefault(name, []).append(path.stem)
    return found


def call(signature: str) -> nodes.literal_block:
    """Return how something is called."""
    return nodes.literal_block(signature, signature, language="python", classes=["reference-call"])


def explained(doc: str, module: str) -> list[nodes.Node]:
    """Return a docstring as nodes.

    Args:
        doc: paragraphs, indented formulas, lists and the sections of Google's style.
        module: where it stands, so that the names in it are known.
    """
    found = []
    for block in filter(None, re.split(r"\n\s*\n", doc.strip("\n"))):
        if head := SECTION.match(block):
            found.append(nodes.rubric("", HEADS[head[1]]))
            found += section_body(head[1], block[head.end() :], module)
        else:
            found += paragraph(block, module)
    return found


def section_body(head: str, body: str, module: str) -> list[nodes.Node]:
    """Return the items of a section of a docstring as a list of terms and what they mean."""
    lines = [line[4:] for line in body.splitlines()]
    items = re.split(r"\n(?=\S)", "\n".join(lines))
    pairs = [re.match(r"((?:[\w*.]+(?:, )?)+): (.*)", item, re.DOTALL) for item in items]
    if not all(pairs):
        return [nodes.paragraph("", "", *inline(" ".join(body.split()), module))]
    terms = []
    for pair in pairs:
        term = nodes.term("", "", nodes.literal("", pair[1], module=""))
        meaning = nodes.paragraph("", "", *inline(" ".join(pair[2].split()), module))
        terms.append(nodes.definition_list_item("", term, nodes.definition("", meaning)))
    return [nodes.definition_list("", *terms, classes=["reference-terms"])]


def paragraph(block: str, module: str) -> list[nodes.Node]:
    """Return a paragraph, a list, or lines whose columns must be kept."""
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines) or re.search(r"\S {3,}\S", block):
        text = "\n".join(line.removeprefix("    ") for line in lines).replace("`", "")
        return [nodes.literal_block(text, text, language="none")]
    first, *items = re.split(r"(?m)^- ", block)
    found = [nodes.paragraph("", "", *inline(first, module))] if first.strip() else []
    if items:
        points = [nodes.list_item("", nodes.paragraph("", "", *inline(i, module))) for i in items]
        found.append(nodes.bullet_list("", *points))
    return found


def inline(text: str, module: str) -> list[nodes.Node]:
    """Return a text with `code`, *stressed* words and **headings** of paragraphs."""
    found = []
    for part in re.split(r"(`[^`]+`|(?<!\w)\*\*\w[^*]+\*\*|(?<!\w)\*\w+\*)", text.strip()):
        if part.startswith("`"):
            found.append(nodes.literal("", part.strip("`"), module=module))
        elif re.fullmatch(r"\*\w+\*", part):
            found.append(nodes.emphasis("", part.strip("*")))
        elif re.fullmatch(r"\*\*\w[^*]+\*\*", part):
            found.append(nodes.strong("", part.strip("*")))
        else:
            found.append(nodes.Text(part))
    return found


class Names:
    """What a name in a text may mean."""

    def __init__(self, env):
        self.objects = env.get_domain("py").objects
        self.uses = uses_of_chapters(env)
        self.by_last = {}
        for name in self.objects:
            self.by_last.setdefault(name.rpartition(".")[2], []).append(name)
        self.common = set(public_names.exports(PACKAGE).values())

    def find(self, text: str, page: str, module: str) -> str | None:
        """Return the full name that a text means on a page, or in a docstring of a module."""
        text = text.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z][\w.]*", text):
            return None
        candidates = self.by_last.get(text.rpartition(".")[2], [])
        if "." in text:
            return only([c for c in candidates if c == text or c.endswith(f".{text}")])
        nearest = [c for c in candidates if module and self._is_in(c, module)]
        used = [c for c in candidates if page in self.uses.get(c, ())]
        common = [c for c in candidates if c in self.common]
        methods = [c for c in candidates if self.objects[c].objtype == "method"]
        part = [c for c in methods if page in self.uses.get(c.rpartition(".")[0], ())]
        # benchmarks bear the names of what they measure, which are other people's
        telling = [c for c in candidates if f"{PACKAGE}.benchmark" not in c and len(text) > 1]
        if "_" not in text and text == text.lower():
            telling = []
        return next(filter(None, map(only, (nearest, used, common, part, telling))), None)

    def _is_in(self, name: str, module: str) -> bool:
        return name.rpartition(".")[0] == module and self.objects[name].objtype != "module"


def only(names: list[str]) -> str | None:
    """Return the one name of a list that has no other."""
    return names[0] if len(names) == 1 else None


def link_names(app, doctree, docname) -> None:
    """Let the first mention of a name in a section lead to its entry; fill in the index."""
    if not hasattr(app, "public_names"):
        app.public_names = Names(app.env)
    names = app.public_names
    for place in list(doctree.findall(index_of_all)):
        place.replace_self(index_of_names(app, docname))
    seen = set()
    for code in list(doctree.findall(nodes.literal)):
        if code.children and not is_heading(code):
            name = names.find(code.astext(), docname.rpartition("/")[2], code.get("module", ""))
            key = section_of(code), name
            if name and key not in seen and name != section_of(code):
                seen.add(key)
                code.replace_self(link(app, docname, name, code.deepcopy()))
    list_uses(app, doctree, docname)


def list_uses(app, doctree: nodes.document, docname: str) -> None:
    """Close a chapter with what it used of the package, but for the pictures."""
    page, names = docname.rpartition("/")[2], app.public_names
    used = [name for name, pages in names.uses.items() if page in pages and name in names.objects]
    used = sorted((n.rpartition(".")[2], n) for n in used if f"{PACKAGE}.plotting" not in n)
    if used:
        line = nodes.paragraph(
            "", "Package functions used on this page:", classes=["reference-uses"]
        )
        for short, name in used:
            line += [nodes.Text(" "), link(app, docname, name, nodes.literal("", short))]
        next(doctree.findall(nodes.section)).append(line)


def is_heading(node: nodes.Node) -> bool:
    """Whether a node stands in a title, a term or a link, which lead nowhere else."""
    return any(
        isinstance(above, (nodes.title, nodes.reference, nodes.term)) for above in parents(node)
    )


def section_of(node: nodes.Node) -> str:
    """Return the name of the section that a node is in."""
    return next((s["ids"][0] for s in parents(node) if isinstance(s, nodes.section)), "")


def parents(node: nodes.Node) -> Iterator[nodes.Node]:
    """Walk from a node up to its document."""
    while node.parent is not None:
        node = node.parent
        yield node


def link(app, docname: str, name: str, shown: nodes.Node) -> nodes.reference:
    """Return a link from a page to an entry."""
    entry = app.env.get_domain("py").objects[name]
    uri = app.builder.get_relative_uri(docname, entry.docname)
    return nodes.reference("", "", shown, internal=True, refuri=f"{uri}#{entry.node_id}")


def index_of_names(app, docname: str) -> nodes.definition_list:
    """Return all names by module, each leading to its entry."""
    objects = app.env.get_domain("py").objects
    whole = public_names.exports(PACKAGE).values()
    listed = {PACKAGE: [public_names.definition(name) for name in whole]}
    for module in public_names.modules().values():
        if module.name in objects:
            listed[module.name] = [e.name for e in module.entries if e.name in objects]
    items = []
    for module, entries in listed.items():
        title = nodes.literal("", module)
        title = link(app, docname, module, title) if module in objects else title
        about = public_names.modules()[module].doc.splitlines()[0]
        line = nodes.paragraph()
        for short, name in sorted((name.rpartition(".")[2], name) for name in entries):
            line += [link(app, docname, name, nodes.literal("", short)), nodes.Text(" ")]
        meaning = nodes.definition("", nodes.paragraph("", "", *inline(about, "")), line)
        items.append(nodes.definition_list_item("", nodes.term("", "", title), meaning))
    return nodes.definition_list("", *items, classes=["reference-index"])


def setup(app) -> dict:
    """Register with Sphinx."""
    app.add_node(index_of_all)
    app.add_directive("reference", Reference)
    app.add_directive("reference-index", ReferenceIndex)
    app.connect("doctree-resolved", link_names)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
