"""The config groups of conf/, of plug-in folders and of `recipes=` folders, and their choices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.core import plugins
from data_pipeline.core.schema import ConfigError
from launch.cli.outside import recipe_folders

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENT, HEAD = "experiment", "add_head"
DEFINITIONS = ("task", "label_set")
"""Folders of conf/ that `auricle evaluate` reads itself, and which are not config groups."""
KINDS = {"objectives": "objective", "encoders": "encoder", "frontends": "frontend", "heads": HEAD}
"""Kinds of plug-ins and their config groups. A config has one of each, and any heads: `add_head@heads.NAME=CHOICE`."""


def groups(folder: Path = CONF) -> dict[str, list[str]]:
    """Returns the config groups below `folder` and of the user's folders, each with its choices, sorted.

    Raises:
        ConfigError: a choice of the user's has the name of another one.
    """
    found: dict[str, dict[str, Path]] = {}
    for source in (folder, *outside_folders()):
        for group, files in _groups_of(source):
            for file in files:
                other = found.setdefault(group, {}).setdefault(file.stem, file)
                if other != file:
                    raise ConfigError(f"{file}: there is another {group} {file.stem}, {other}; rename one of the files")
    for group, name in without_yaml():
        found.setdefault(group, {})[name] = Path()
    return {group: sorted(files) for group, files in sorted(found.items())}


def without_yaml() -> list[tuple[str, str]]:
    """Returns (group, choice) of the plug-ins from outside without a YAML file; their choice is `name: NAME` alone."""
    found = []
    for kind, group in KINDS.items():
        for source in plugins.sources():
            for name in (file.stem for file in sorted((source.folder / kind).glob("*.py"))):
                if not name.startswith("_") and not (source.folder / "conf" / group / f"{name}.yaml").is_file():
                    found.append((group, name))
    return found


def outside_folders() -> list[Path]:
    """Returns the folders with config groups from outside: conf/ of plug-in folders, and `recipes=` folders."""
    folders = [source.folder / "conf" for source in plugins.sources()]
    return [folder for folder in folders if folder.is_dir()] + recipe_folders()


def _groups_of(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yields the groups of a folder; a `recipes=` folder contains experiments."""
    if folder in recipe_folders():
        yield EXPERIMENT, sorted(folder.glob("*.yaml"))
        return
    for group in sorted(folder.iterdir()):
        if group.is_dir() and not group.name.startswith(("_", ".")) and group.name not in DEFINITIONS:
            yield group.name, sorted(group.glob("*.yaml"))
