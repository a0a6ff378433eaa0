"""Settings of all tests, those of the notebooks included."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch
from filelock import FileLock

# Shapes and dtypes in the package's signatures are checked whenever a test calls a function. The
# kernels are left out: their compilers read the functions themselves.
MODULES = (Path(__file__).parents[1] / "mamba_tutorial").glob("[a-z]*.py")
jaxtyping.install_import_hook(
    [f"mamba_tutorial.{path.stem}" for path in MODULES], "beartype.beartype"
)

# Without a GPU, Triton's kernels are interpreted. That must be said before anything imports Triton,
# and other libraries do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: who changes nothing sees nothing change.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

NOTEBOOK_SECONDS = 60  # what each chapter promises the reader, on two CPU cores of their own
PACE = 0.19  # seconds of `pace` on such a machine (two cores of an AMD EPYC), with nothing else


@pytest.fixture
def as_a_user():
    """Turn the signature checks off, so that a wrong argument meets the package's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built book, every warning an error; built once for all processes that test it."""
    place, root = tmp_path_factory.getbasetemp(), Path(__file__).parents[1]
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with FileLock(place / "book.lock"):
        if not (place / "book").exists():
            folder = tmp_path_factory.mktemp("build")
            for name in ("_config.yml", "_toc.yml"):
                shutil.copy(root / name, folder)
            shutil.copytree(root / "book", folder / "book", ignore=shutil.ignore_patterns(".*"))
            command = Path(sys.executable).with_name("jupyter-book")
            command = [command, "build", folder, "-W", "-n", "-q"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
            folder.rename(place / "book")
    return place / "book/_build/html"


def pace():
    """Return the seconds of a fixed piece of work like that of the notebooks, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layer, x = torch.nn.GRU(48, 24, batch_first=True), torch.ones(64, 64, 48)
    layer(x)  # whatever the first call sets up
    start = time.perf_counter()
    for _ in range(20):
        layer(x)[0].square().mean().backward()
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return seconds


class PaceMaker:
    """Notes the pace of the machine now and then while a notebook runs."""

    def pytest_runtest_setup(self, item):
        cell = item.nodeid.partition(".ipynb::Cell ")[2]
        if cell and int(cell) % 8 == 0:
            item.user_properties.append(("pace", pace()))


class NotebookClock:
    """Fails the session if the cells of a notebook took longer together than promised.

    Here two notebooks run at once, perhaps on a machine that others use too. So the limit is longer
    by as much as the pace is slower than on a machine with nothing else to do, by half at most.
    """

    def __init__(self):
        self.seconds = defaultdict(float)
        self.paces = defaultdict(list)

    def pytest_runtest_logreport(self, report):
        path = report.nodeid.partition("::")[0]
        if path.endswith(".ipynb"):
            self.seconds[path] += report.duration
            if report.when == "setup":
                paces = [value for name, value in report.user_properties if name == "pace"]
                self.paces[path] += paces
                self.seconds[path] -= sum(paces)

    def limit(self, path):
        return NOTEBOOK_SECONDS * min(
            1.5, max(1, statistics.mean(self.paces[path] or [PACE]) / PACE)
        )

    def pytest_sessionfinish(self, session):
        if any(seconds > self.limit(path) for path, seconds in self.seconds.items()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for path, seconds in sorted(self.seconds.items()):
            limit = self.limit(path)
            verdict = "" if seconds <= limit else ", FAILED"
            line = f"{path} took {seconds:.1f} s of {limit:.0f} s at this pace{verdict}"
            terminalreporter.write_line(line)


def pytest_configure(config):
    config.pluginmanager.register(PaceMaker())
    if not hasattr(config, "workerinput"):  # under xdist, reports meet in the main process
        config.pluginmanager.register(NotebookClock())
