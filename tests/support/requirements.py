"""What pyproject.toml requires, with all that its packages require in turn."""

from __future__ import annotations

import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT


def requirements(*extras: str) -> list[Requirement]:
    """Returns the requirements of the project, and those of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [
        Requirement(line) for line in [*project["dependencies"], *(row for name in extras for row in optional[name])]
    ]


def extras() -> list[str]:
    """Returns the names of the extras that users need; `dev` is for the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["optional-dependencies"] if name != "dev"]


def closure(required: list[Requirement]) -> set[str]:
    """Returns the installed distributions that these requirements bring, by normalised name."""
    todo, seen = list(required), set[tuple[str, frozenset[str]]]()
    found = set[str]()
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = metadata.distribution(one.name).requires or []
        except metadata.PackageNotFoundError:  # for another platform, or an extra that is not installed here
            continue
        found.add(key[0])
        for below in map(Requirement, lines):
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                todo.append(below)
    return found


def top_level(distributions: set[str]) -> set[str]:
    """Returns the names in site-packages that belong to these distributions."""
    files = (file for name in distributions for file in metadata.distribution(name).files or ())
    return {file.parts[0] for file in files} - {"..", "__pycache__"}
