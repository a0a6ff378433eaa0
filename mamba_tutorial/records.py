"""The measurements that chapters quote: what `make bench` and the experiments wrote.

Nothing is downloaded where the book lies on disk.
"""

import json
import urllib.error
import urllib.request
from pathlib import Path

RECORDS = "https://raw.githubusercontent.com/mamba-tutorial/mamba-tutorial/main/book/results"


def recorded(name: str) -> dict:
    """Return a record of `make bench` or of an experiment, with its command and the machine.

    From `results/` beside the notebook; where the notebook stands alone, as on Colab, from the
    book's repository.

    Raises:
        FileNotFoundError: the record is in neither place.
    """
    path = Path("results", f"{name}.json")
    if path.exists():
        return json.loads(path.read_text())
    try:
        with urllib.request.urlopen(f"{RECORDS}/{path.name}", timeout=20) as answer:
            return json.loads(answer.read())
    except urllib.error.URLError as error:
        raise FileNotFoundError(
            f"there is no {path} here and none at {RECORDS}; make bench or an experiment writes it"
        ) from error
