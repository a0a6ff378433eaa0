"""The public names of the package and the chapters that use them, read from the source files.

Nothing is imported: the book is built where there is neither Triton nor a GPU, and the kernels are
explained all the same. Public is a function or a class whose name, and the names of the files that
it is in, begin with no underscore; and whatever an `__all__` lists, constants and names from other
files.
"""

import ast
import importlib.util
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "mamba_tutorial"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Entry:
    """A public function, class or constant, or a method or property of a class."""

    name: str  # with its module, and its class if it has one
    kind: str
    signature: str
    doc: str
    path: str  # from the root of the repository
    lines: tuple[int, int]
    members: list["Entry"] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The name alone."""
        return self.name.rpartition(".")[2]


@dataclass
class Module:
    """A public module: what it says of itself, and its entries in the order of the file."""

    name: str
    doc: str
    path: str
    entries: list[Entry]


def package_folder() -> Path:
    """Return where the package lies; it is not imported."""
    return Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])


@cache
def tree(module: str) -> tuple[ast.Module, Path]:
    """Return the parsed file of a module of the package, and its path."""
    folder = package_folder().joinpath(*module.split(".")[1:])
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return ast.parse(path.read_text("utf-8")), path


def assigned(module: str) -> dict[str, ast.Assign]:
    """Return the constants of a module."""
    nodes = [node for node in tree(module)[0].body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node for node in nodes if isinstance(node.targets[0], ast.Name)}


@cache
def listed(module: str) -> list[str]:
    """Return a module's `__all__`, or nothing if it has none."""
    node = assigned(module).get("__all__")
    return ast.literal_eval(node.value) if node else []


@cache
def exports(module: str) -> dict[str, str]:
    """Return what a module's `__all__` takes from others: name → where it is defined."""
    sources = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in tree(module)[0].body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE)
        for alias in node.names
    }
    return {name: sources[name] for name in listed(module) if name in sources}


@cache
def modules() -> dict[str, Module]:
    """Return all public modules by name."""
    folder, found = package_folder(), {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            name = ".".join(parts)
            found[name] = Module(name, doc_of(tree(name)[0]), relative(path), entries(name))
    return found


@cache
def all_entries() -> dict[str, Entry]:
    """Return all entries by name, methods and properties too."""
    found = {}
    for module in modules().values():
        for entry in module.entries:
            for each in (entry, *entry.members):
                found[each.name] = each
    return found


def relative(path: Path) -> str:
    """Return a path from the root of the repository."""
    return path.relative_to(package_folder().parent).as_posix()


def doc_of(node: ast.AST) -> str:
    """Return the docstring, or nothing."""
    return ast.get_docstring(node) or ""


def is_public(node: ast.AST) -> bool:
    """Whether a node defines a function or a class for all to use."""
    return isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")


def entries(module: str) -> list[Entry]:
    """Return the public functions and classes of a module, and the constants that it lists."""
    found = [entry_of(module, node) for node in tree(module)[0].body if is_public(node)]
    for name in listed(module):
        origin, _, original = exports(module).get(name, f"{module}.{name}").rpartition(".")
        if node := assigned(origin).get(original):
            where = relative(tree(origin)[1]), (node.lineno, node.end_lineno)
            found.append(Entry(f"{module}.{name}", "data", ast.unparse(node), "", *where))
        elif re.search(r"\._", f".{origin}"):  # else it is explained where it is defined
            node = next(n for n in tree(origin)[0].body if getattr(n, "name", "") == original)
            entry = entry_of(origin, node)
            found.append(renamed(entry, entry.name, f"{module}.{name}"))
    return found


def renamed(entry: Entry, before: str, after: str) -> Entry:
    """Return an entry under the name by which others know it."""
    members = [renamed(member, before, after) for member in entry.members]
    return Entry(**{**vars(entry), "name": after + entry.name[len(before) :], "members": members})


def entry_of(module: str, node: ast.AST) -> Entry:
    """Return the entry of a function or class."""
    name, path = f"{module}.{node.name}", relative(tree(module)[1])
    lines = node.lineno, node.end_lineno
    if isinstance(node, FUNCTION):
        return Entry(name, "function", signature(module, node), doc_of(node), path, lines)
    members = []
    for part in node.body:
        if isinstance(part, FUNCTION) and not part.name.startswith("_") and doc_of(part):
            decorators = {ast.unparse(decorator) for decorator in part.decorator_list}
            is_property = bool(decorators & {"property", "cached_property"})
            kind = "property" if is_property else "method"
            shape = part.name if is_property else signature(module, part, skip=1)
            where = path, (part.lineno, part.end_lineno)
            members.append(Entry(f"{name}.{part.name}", kind, shape, doc_of(part), *where))
    return Entry(name, "class", class_signature(module, node), doc_of(node), path, lines, members)


def class_signature(module: str, node: ast.ClassDef) -> str:
    """Return how a class is called: by its `__init__`, or by its fields."""
    for part in node.body:
        if isinstance(part, FUNCTION) and part.name == "__init__":
            return signature(module, part, name=node.name, skip=1)
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    words = [ast.unparse(decorator) for decorator in node.decorator_list]
    words += [ast.unparse(base) for base in node.bases]
    if fields and re.search("dataclass|NamedTuple", " ".join(words)):
        return laid_out(node.name, [spelled(module, part) for part in fields], "")
    return node.name


def signature(module: str, node: ast.AST, name: str = "", skip: int = 0) -> str:
    """Return the call of a function with the types of all arguments.

    Args:
        module: the module that it is in.
        node: the function.
        name: what to call it; its own name by default.
        skip: how many arguments to leave out: 1 for self.
    """
    given, parts = node.args, []
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    pairs = list(zip(plain, defaults, strict=True))
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    for argument, default in pairs[0 if static else skip :]:
        parts.append(one_argument(module, argument, default))
    if given.vararg:
        parts.append(f"*{one_argument(module, given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parts.append(one_argument(module, argument, default))
    if given.kwarg:
        parts.append(f"**{one_argument(module, given.kwarg, None)}")
    returned = "" if name or node.returns is None else f" -> {spelled(module, node.returns)}"
    return laid_out(name or node.name, parts, returned)


def one_argument(module: str, argument: ast.arg, default: ast.AST | None) -> str:
    """Return an argument with its type and its default."""
    kind = f": {spelled(module, argument.annotation)}" if argument.annotation else ""
    if default is None:
        return argument.arg + kind
    return f"{argument.arg}{kind}{' = ' if kind else '='}{ast.unparse(default)}".replace("'", '"')


def spelled(module: str, node: ast.AST) -> str:
    """Return an annotation as text, the module's own names for types spelled out."""

    class Spell(ast.NodeTransformer):
        def visit_Name(self, name):
            return aliases(module).get(name.id, name)

    copy = ast.parse(ast.unparse(node)).body[0]
    return ast.unparse(Spell().visit(copy)).replace("'", '"').replace('" ', '"')


@cache
def aliases(module: str) -> dict[str, ast.AST]:
    """Return a module's names for types, as they are defined there or where they come from."""
    found = {}
    for node in tree(module)[0].body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            others = aliases(node.module) if node.module != module else {}
            found |= {a.asname or a.name: others[a.name] for a in node.names if a.name in others}
    for name, node in assigned(module).items():
        if isinstance(node.value, (ast.Subscript, ast.BinOp)) and re.match("[A-Z][a-z]", name):
            found[name] = node.value
    return found


def laid_out(name: str, parts: list[str], returned: str) -> str:
    """Return a call on one line, or with a line for each argument if it is long."""
    line = f"{name}({', '.join(parts)}){returned}"
    if len(line) <= 76 or not parts:
        return line
    if len(returned) > 76:
        returned = returned.replace("] | tuple[", "]\n    | tuple[")
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returned}"])


def definition(name: str) -> str:
    """Return the full name under which an imported name is explained; it may be a module's."""
    for _ in range(3):  # from one package's __init__ to the next
        module, _, short = name.rpartition(".")
        if name in all_entries() or module not in modules() or short not in exports(module):
            break
        name = exports(module)[short]
    return name


@cache
def names_used(notebook: Path) -> list[str]:
    """Return the full names of what the code cells of a notebook use of the package."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    known, found = {}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        # a command to IPython is no Python
        code = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", "".join(cell["source"]))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    name = definition(f"{node.module}.{alias.name}")
                    known[alias.asname or alias.name] = name
                    found.append(name)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in known:
                found.append(definition(f"{known[node.value.id]}.{node.attr}"))
    return [name for name in dict.fromkeys(found) if name in all_entries()]
