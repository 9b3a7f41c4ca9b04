"""The arguments `plugins=` and `recipes=` of every command: plug-ins and experiments from the user's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.core.plugins import folders_in
from data_pipeline.core.schema import ConfigError

RECIPES = "AURICLE_RECIPES"
"""Environment variable with folders of experiments, separated as those of PATH."""
ARGUMENTS = ("plugins", "recipes")
_LIST = re.compile(r"\[(.*)\]", re.DOTALL)


def take_outside(arguments: Sequence[str]) -> list[str]:
    """Makes the named folders available to this process and its children; returns the other arguments.

    Args:
        arguments: those of a command; `plugins=FOLDER`, `plugins=[FOLDER, FOLDER]`, and the same of `recipes`.

    Raises:
        ConfigError: a folder does not exist, has no plug-ins or experiments, or a name that exists already.
    """
    rest: list[str] = []
    for argument in arguments:
        name, equals, value = argument.lstrip("+").partition("=")
        if not equals or name not in ARGUMENTS:
            rest.append(argument)
            continue
        found = _LIST.fullmatch(value.strip())
        folders = [part.strip().strip("'\"") for part in (found[1].split(",") if found else [value])]
        folders = [folder for folder in folders if folder]
        if name == "recipes":
            _allow_recipes(folders)
        else:
            from pretrain import registry

            registry.allow(folders)
    return rest


def recipe_folders() -> list[Path]:
    """Returns the folders in AURICLE_RECIPES."""
    return folders_in(RECIPES)


def _allow_recipes(folders: Sequence[str]) -> None:
    found = recipe_folders()
    for folder in folders:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(f"recipes={folder}: there is no such folder")
        if not any(path.glob("*.yaml")):
            raise ConfigError(
                f"recipes={folder}: no experiments there; an experiment NAME is the file {folder}/NAME.yaml"
            )
        if os.pathsep in str(path):
            raise ConfigError(f"recipes={folder}: a {os.pathsep!r} in its path separates folders; rename it")
        if path not in found:
            found.append(path)
    if found:
        os.environ[RECIPES] = os.pathsep.join(map(str, found))
