"""Commands and programs that the documentation shows."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

from tests.support.paths import ROOT

PAGES = (
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)


def commands(page: Path) -> list[list[str]]:
    """Returns the arguments of every `auricle …` line of an indented block, continuation lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line[4:].split("  #")[0] for line in text.splitlines() if re.match(r"    auricle [^→]", line)]
    return [shlex.split(line)[1:] for line in lines]


def programs(page: Path) -> list[str]:
    """Returns the Python programs in fenced blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def cells(notebook: Path) -> list[str]:
    """Returns the programs in the code cells of a Jupyter notebook."""
    listed = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in listed if cell["cell_type"] == "code"]


def listing(page: Path, heading: str) -> str:
    """Returns the code blocks of the list items of a section, in order, as one program."""
    section = page.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    kept = [line[8:] for line in section.splitlines() if line.startswith(" " * 8) or not line]
    return "\n".join(kept) + "\n"


def write_plugins(folder: Path) -> None:
    """Writes the documented plug-in and recipe, which the documentation has in /my/folder and /my/recipes."""
    for name in ("folder/objectives", "recipes"):
        (folder / name).mkdir(parents=True)
    objective = listing(ROOT / "CONTRIBUTING.md", "Add an objective in six steps")
    (folder / "folder" / "objectives" / "masked_mel.py").write_text(objective)
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    recipe = page.partition("    # @package _global_\n")[2].partition("\n\n")[0]
    (folder / "recipes" / "louder.yaml").write_text("# @package _global_\n" + textwrap.dedent(recipe))
