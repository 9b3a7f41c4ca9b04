"""Detects other packages that hide those of auricle.

A folder on PYTHONPATH comes before installed packages, and ROS 2, among others, has a package called `launch`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""Folder of auricle's packages: the checkout, or site-packages."""
PACKAGES = ("data_pipeline", "launch", "pretrain")


def foreign(name: str) -> Path | None:
    """Returns the folder of the package `name` that Python finds, where it is not auricle's; otherwise None."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None  # the import reports it
    found = [Path(place).resolve() for place in spec.submodule_search_locations or [spec.origin or name]]
    return None if HOME / name in found[:1] else found[0]


def explain(name: str, found: Path) -> str:
    """Returns the error message for another package `name` in `found`, with the remedy."""
    message = (
        f"auricle: Python finds another package called `{name}`, {found}, before that of auricle, {HOME / name} "
        "(ROS 2 has a package `launch`). "
    )
    if any(place and Path(place).resolve() == found.parent for place in sys.path):
        message += f"Take {found.parent} out of PYTHONPATH (`env -u PYTHONPATH auricle …`), or use a terminal "
        return message + "in which the other software's setup script was not sourced"
    return message + "Install auricle into a separate environment, without the other package"
