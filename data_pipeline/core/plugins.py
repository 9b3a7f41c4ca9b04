"""Sources of plug-ins from outside auricle: folders that the user names, and installed packages.

A folder in AURICLE_PLUGINS (set by hand or by `plugins=` on the command line; child processes inherit it), or the
package that an entry point of the group `auricle.plugins` names, contains plug-ins in subfolders such as objectives/.
Code is imported from these places only, never because a config or a checkpoint names it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from data_pipeline.core.schema import ConfigError

VARIABLE = "AURICLE_PLUGINS"
"""Environment variable with plug-in folders, separated as those of PATH."""
ENTRY_POINTS = "auricle.plugins"
"""Group of entry points whose values are packages with plug-ins."""


class PluginSource(NamedTuple):
    """A place with plug-ins."""

    title: str
    """For messages: the folder, or the entry point and its package."""
    package: str
    """The Python package whose subpackages contain the plug-ins."""
    folder: Path


def allow(folders: Iterable[str | Path]) -> None:
    """Adds folders to AURICLE_PLUGINS, for this process and those that it starts.

    Raises:
        ConfigError: a folder does not exist.
    """
    found = folders_in(VARIABLE)
    for folder in folders:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(f"plugins=[{folder}]: there is no such folder{_instead(path)}")
        if os.pathsep in str(path):
            raise ConfigError(f"plugins=[{folder}]: a {os.pathsep!r} in its path separates folders; rename it")
        if path not in found:
            found.append(path)
    if found:
        os.environ[VARIABLE] = os.pathsep.join(map(str, found))


def folders_in(variable: str) -> list[Path]:
    """Returns the folders in an environment variable, which a colon separates."""
    return [Path(part).expanduser().resolve() for part in os.environ.get(variable, "").split(os.pathsep) if part]


def sources() -> tuple[PluginSource, ...]:
    """Returns the folders in AURICLE_PLUGINS, then the packages of the installed entry points; imports no plug-in."""
    return (*(_of_folder(folder) for folder in folders_in(VARIABLE)), *installed())


def _of_folder(folder: Path) -> PluginSource:
    """Makes a Python package of a folder, so that its modules can import each other and be pickled."""
    digest = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    name = f"auricle_plugins_{re.sub(r'[^0-9A-Za-z]+', '_', folder.name)}_{digest}"
    if name not in sys.modules:
        package = ModuleType(name, f"The plug-ins in {folder}.")
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return PluginSource(str(folder), name, folder)


@functools.cache
def installed() -> tuple[PluginSource, ...]:
    """Returns the packages that entry points of the group name; imports none of their plug-ins."""
    found = []
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        spec = importlib.util.find_spec(point.value)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found.append(PluginSource(f"entry point {point.name} = {point.value}", point.value, Path(folder)))
    return tuple(found)


def _instead(path: Path) -> str:
    if path.suffix == ".py" and path.is_file():
        return f", it is a file; name the folder above objectives/, encoders/ …, such as {path.parent.parent}"
    return ""
