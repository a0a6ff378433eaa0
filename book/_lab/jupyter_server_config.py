"""Settings of JupyterLab for the chapters: jupyter lab --config=<this file>."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from book_contents import BookContents

c = get_config()  # noqa: F821 (Jupyter provides it)
c.ServerApp.contents_manager_class = BookContents
