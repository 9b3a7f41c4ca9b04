"""The config groups of conf/ and their choices."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"


def groups(folder: Path = CONF) -> dict[str, list[str]]:
    """Returns the config groups below `folder`, each with its choices, sorted."""
    return {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and not group.name.startswith(("_", "."))
    }
