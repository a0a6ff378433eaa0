"""Print the oldest version of each library that the package and its chapters may be used with.

python .ci/oldest.py > oldest.txt; pip install -c oldest.txt -e ".[notebooks]"
"""

import re
from pathlib import Path

if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    for name in ("dependencies", "fast", "checkpoints", "notebooks"):
        listed = re.search(rf"^{name} = \[.*?\]\n", text, re.DOTALL | re.MULTILINE)[0]
        for library, version in re.findall(r'"([\w-]+)>=([\d.]+)"', listed):
            print(f"{library}=={version}")
