"""Settings of all tests, those of the notebooks included."""

import os
from collections import defaultdict
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

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

NOTEBOOK_SECONDS = 60  # what each chapter promises the reader, on two CPU cores


@pytest.fixture
def as_a_user():
    """Turn the signature checks off, so that a wrong argument meets the package's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class NotebookClock:
    """Fails the session if the cells of a notebook took longer together than promised."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        path = report.nodeid.partition("::")[0]
        if path.endswith(".ipynb"):
            self.seconds[path] += report.duration

    def pytest_sessionfinish(self, session):
        if any(seconds > NOTEBOOK_SECONDS for seconds in self.seconds.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for path, seconds in sorted(self.seconds.items()):
            verdict = "" if seconds <= NOTEBOOK_SECONDS else f": over {NOTEBOOK_SECONDS} s, FAILED"
            terminalreporter.write_line(f"{path} took {seconds:.1f} s{verdict}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # under xdist, reports meet in the main process
        config.pluginmanager.register(NotebookClock())
