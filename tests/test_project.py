"""What the README, the environment file and the package promise to somebody who installs them."""

import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mamba_tutorial
from mamba_tutorial import data, records
from mamba_tutorial.mamba import MambaBlock, MambaLM
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import selective_scan
from mamba_tutorial.training import train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_quick_and_needs_neither_triton_nor_a_gpu_nor_matplotlib():
    code = """
import sys, time
for name in ("triton", "matplotlib", "scipy", "pywt"):
    sys.modules[name] = None  # an import of it fails
start = time.perf_counter()
import mamba_tutorial
print(time.perf_counter() - start)
"""
    runs = [python(code) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 3.0


def test_every_public_name_exists_and_is_explained():
    for name in mamba_tutorial.__all__:
        assert getattr(mamba_tutorial, name).__doc__


def test_every_module_can_be_read_in_one_sitting():
    lengths = {
        path: len(path.read_text("utf-8").splitlines())
        for path in (ROOT / "mamba_tutorial").rglob("*.py")
    }
    assert {str(path): lines for path, lines in lengths.items() if lines > 500} == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is here")
def test_commands_of_the_readme_exist():
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = set(re.findall(r"^make ([a-z-]+)", help_text, re.M))
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        assert set(re.findall(r"`(?:\w+=\S+ )*make ([a-z-]+)", document)) <= targets
    assert re.findall(r"^make ([a-z-]+)", README, re.M) == ["book", "test", "lab"]


def test_files_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_readme_table_names_every_module_with_its_test():
    modules = {path.stem for path in (ROOT / "mamba_tutorial").glob("[a-z]*.py")}
    for module in modules:
        assert f"[`{module}`](mamba_tutorial/{module}.py)" in README
        assert f"[`test_{module}`](tests/test_{module}.py)" in README


def test_readme_table_names_every_chapter():
    for path in (ROOT / "book").glob("*.ipynb"):
        assert f"(book/{path.name})" in README


def test_version_is_in_the_changelog():
    assert f"\n## {mamba_tutorial.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_repository_has_one_address():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    address = PROJECT["urls"]["Repository"]
    assert config["repository"]["url"] == address
    assert citation["repository-code"] == address
    assert address.removeprefix("https://github.com/") in records.RECORDS


def environment():
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in packages if isinstance(entry, dict))
    return [entry for entry in packages if isinstance(entry, str)], pip


def test_environment_agrees_with_the_project():
    conda, pip = environment()
    interpreter = next(Requirement(entry) for entry in conda if entry.startswith("python"))
    assert interpreter.specifier == SpecifierSet(PROJECT["requires-python"])
    assert "-c constraints.txt" in pip
    assert "-e .[test]" in pip
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *(entry for extra in extras.values() for entry in extra)]
    known = {Requirement(entry).name for entry in declared}
    listed = {Requirement(entry).name for entry in pip if not entry.startswith("-")}
    assert listed <= known
    assert {"jupyter-book", "jupyterlab", "torch", "triton", "matplotlib", "nbval"} <= listed


@pytest.mark.slow
def test_environment_can_be_installed():
    """Pip finds versions that satisfy all of it at once; what is installed here is enough."""
    _, pip = environment()
    local = [entry for entry in pip if not entry.startswith(("-", "triton"))]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index"]
    command += ["--no-build-isolation", "-c", "constraints.txt", "-e", ".[test]", *local]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_constraints_pin_what_the_project_asks_for(minor):
    """Exactly one version of each requirement, inside its range, on each version of Python."""
    here = {"python_version": f"3.{minor}", "platform_system": "Linux"}
    pinned = {}
    for entry in CONSTRAINTS:
        if entry.marker is None or entry.marker.evaluate(here):
            assert entry.name.lower() not in pinned, entry.name
            (only,) = entry.specifier
            assert only.operator == "=="
            pinned[entry.name.lower()] = only.version
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(entry for extra in extras for entry in extra)]:
        requirement = Requirement(text)
        if requirement.name != "mamba-tutorial":
            version = pinned[requirement.name.lower()]
            assert requirement.specifier.contains(version), f"{text}, pinned to {version}"


def test_the_oldest_libraries_are_those_that_the_project_names():
    command = [sys.executable, ROOT / ".ci/oldest.py"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    extras = PROJECT["optional-dependencies"]
    listed = [PROJECT["dependencies"], *map(extras.get, ("fast", "checkpoints", "notebooks"))]
    asked = [Requirement(text) for names in listed for text in names]
    asked = {r.name: r.specifier for r in asked if r.name != "mamba-tutorial"}
    for line in map(Requirement, lines):
        (version,) = line.specifier
        assert asked.pop(line.name).contains(version.version)
    assert not asked


def readme_example(word):
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if word in code)
    result = python(f"import torch\ntorch.manual_seed(0)\n{code}")
    assert result.returncode == 0, result.stderr
    return code, result.stdout


def test_example_of_the_readme_prints_what_it_says():
    code, printed = readme_example("StateSpace")
    assert printed.strip() == re.search(r"# (torch\.Size.*)", code)[1]


@pytest.mark.slow
def test_readme_trains_and_generates_in_ten_lines():
    code, printed = readme_example("reference_text")
    lines = [line for line in code.splitlines() if not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    assert printed.startswith("The function ")
    assert len(printed) > 150
    manual = set(bytes(data.reference_text()[0].tolist()).decode().split())
    words = {word for word in printed[13:].split() if len(word) > 2}
    assert len(words & manual) >= 4  # words, not noise


def test_what_one_may_ask_exists():
    table = README.split("## What you may ask of it")[1].split("##")[0]
    functions = {
        "starts": [selective_scan, linear_scan, MambaBlock.forward, MambaLM.forward],
        "mask": [MambaLM.generate],
        "state": [MambaLM.generate],
        "graph": [train],
    }
    for argument, takers in functions.items():
        assert f"{argument}=" in table
        assert all(argument in inspect.signature(taker).parameters for taker in takers)
    for module, name in (
        ("compat", "selective_scan_fn"),
        ("compat", "patched_transformers"),
        ("distributed", "over_length"),
    ):
        assert name in table
        assert callable(getattr(importlib.import_module(f"mamba_tutorial.{module}"), name))


def test_what_the_readme_says_of_the_gpu_is_recorded():
    record = json.loads((ROOT / "book/results/gpu_selective.json").read_text())
    rows, short = {}, (1, 2048, 1536)
    for row in record["results"]:
        size = row["batch"], row["length"], row["d_inner"]
        rows.setdefault(size, {})[row["name"]] = row
    pairs = {size: (row["mamba_ssm, CUDA"], row["mamba_tutorial"]) for size, row in rows.items()}

    def ratios(key):
        return {size: theirs[key] / ours[key] for size, (theirs, ours) in pairs.items()}

    assert record["environment"]["gpu"].startswith("NVIDIA H100")
    assert "On an NVIDIA H100 the selective scan" in README
    both, forward, memory = ratios("both_ms"), ratios("forward_ms"), ratios("peak_mib")
    said = f"{min(both.values()):.1f} to {max(both.values()):.1f} times as fast"
    assert f"forward and backward, is {said} as the official CUDA kernel at all eight" in README
    assert len(pairs) == 8
    assert [size for size in pairs if memory[size] < 0.99] == [short]
    assert "in the same memory but for one short sequence" in README
    assert [size for size in pairs if forward[size] <= 2] == [short]
    assert "forward alone at least twice as fast at seven of them" in README


def test_what_the_readme_says_of_other_sizes_is_recorded():
    rows = json.loads((ROOT / "book/results/gpu_sweep.json").read_text())["results"]

    def faster(row):
        return all(row[f"ours_{key}"] < row[f"official_{key}"] for key in ("forward_ms", "both_ms"))

    assert f"At {sum(map(faster, rows))} of {len(rows)} other sizes" in README
    (other,) = (row for row in rows if not faster(row))
    assert other["ours_both_ms"] < other["official_both_ms"]
    forward = f"{1e3 * other['ours_forward_ms']:.0f} microseconds, is slower forwards alone"
    assert f"the other, whose forward pass takes {forward}" in README
    memory = {}
    for row in rows:
        each = row["ours_peak_mib"] / row["official_peak_mib"]
        memory[row["d_state"]] = max(each, memory.get(row["d_state"], 0))
    assert min(memory[n] for n in memory if n > 16) > 1.1
    assert max(memory.values()) == memory[128] < 4.4
    assert "More than 16 states cost it more memory, 128 up to 4.4 times as much" in README


@pytest.mark.parametrize(
    ("seconds", "slower", "fails"), [(59, 1, 0), (61, 1, 1), (80, 1.4, 0), (91, 3, 1)]
)
def test_a_notebook_that_takes_too_long_fails_the_session(request, seconds, slower, fails):
    plugins = request.config.pluginmanager.get_plugins()
    maker = next(plugin for plugin in plugins if type(plugin).__name__ == "PaceMaker")
    conftest = sys.modules[type(maker).__module__]
    clock, pace = conftest.NotebookClock(), slower * conftest.PACE
    cell = SimpleNamespace(nodeid="book/slow.ipynb::Cell 0", user_properties=[("pace", pace)])
    clock.pytest_runtest_logreport(SimpleNamespace(**vars(cell), when="setup", duration=pace))
    clock.pytest_runtest_logreport(SimpleNamespace(**vars(cell), when="call", duration=seconds))
    session = SimpleNamespace(exitstatus=0)
    clock.pytest_sessionfinish(session)
    assert session.exitstatus == fails


def test_the_package_is_whole_and_typed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "mamba_tutorial").rglob("__init__.py")}
    assert {".".join(f.relative_to(ROOT).parts) for f in folders} == set(settings["packages"])
    for folder in folders:
        kinds = settings["package-data"].get(".".join(folder.relative_to(ROOT).parts), [])
        for path in folder.iterdir():
            if path.is_file() and path.suffix != ".py":
                assert any(path.match(kind) for kind in kinds), path


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == mamba_tutorial.__version__
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert citation["url"] == config["html"]["baseurl"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_files_of_the_repository_can_be_read(path):
    content = yaml.safe_load(path.read_text("utf-8"))
    if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
        assert {"name", "description", "body"} <= set(content)


def test_the_container_makes_what_the_readme_does():
    made = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text("utf-8"))
    assert made["postCreateCommand"] == "make book"
