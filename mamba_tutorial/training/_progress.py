"""How a progress bar is shown: on a terminal, in a notebook, or not at all."""

import sys


def bar_settings() -> dict:
    """In a notebook one line of output that is replaced; on a terminal tqdm's own; else nothing."""
    if "IPython" in sys.modules:
        from IPython import get_ipython

        if hasattr(get_ipython(), "kernel"):
            return {"file": _NotebookLine(), "mininterval": 0.5}
    return {"disable": None}


class _NotebookLine:
    """A stream for tqdm that shows the last thing written to it as one line of output."""

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if text.strip():
            self.handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        """Nothing waits."""
