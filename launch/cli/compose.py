"""Composes command-line overrides to one plain config with Hydra; the only module that imports Hydra.

Hydra only composes: `data_pipeline.core.schema.load` checks types and limits of every value afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.core.schema import ConfigError, hint
from launch.cli.groups import CONF, DEFINITIONS, EXPERIMENT, HEAD, KINDS, groups, outside_folders, without_yaml
from launch.cli.outside import recipe_folders

READABLE_VARIABLES = ("HOME", "USER", "LOGNAME", "HOSTNAME", "PWD", "TMPDIR", "SCRATCH", "WORK", "PROJECT", "DATA")
READABLE_PREFIXES = ("AURICLE_", "SLURM_")
"""Environment variables that `${oc.env:NAME}` may read: configs are saved in run folders, and other variables may
contain credentials."""


SUFFIX = "__"
"""Appended to fields with the name of a folder of conf/, such as `task`, which Hydra would take for a config group."""


def _variable(name: str, *default: str) -> str:
    """Resolves `${oc.env:NAME}` and `${oc.env:NAME,default}`."""
    if name not in READABLE_VARIABLES and not name.startswith(READABLE_PREFIXES):
        allowed = ", ".join((*READABLE_VARIABLES, *(f"{prefix}…" for prefix in READABLE_PREFIXES)))
        raise ConfigError(
            f"${{oc.env:{name}}}: a config is saved in the run folder, so only the environment variables "
            f"{allowed} are read; write the value itself"
        )
    if name not in os.environ and not default:
        raise ConfigError(f"${{oc.env:{name}}}: the environment variable is not set")
    return os.environ.get(name, *default)


OmegaConf.register_new_resolver("oc.env", _variable, replace=True)


def compose(root: str, overrides: Iterable[str], folder: Path = CONF) -> dict[str, Any]:
    """Returns the config of `folder/root.yaml` and the overrides as plain values, with `~` expanded.

    Args:
        root: name of the root config, the same as the command.
        overrides: `field=value`, `group=choice` (a leading + is accepted) or `~field`.
        folder: folder of the YAML files.

    Raises:
        ConfigError: an override is malformed, or names a choice that does not exist.
    """
    chosen = groups(folder)
    in_defaults = _groups_in_defaults(folder / f"{root}.yaml")
    lines = [to_hydra(line, chosen, in_defaults) for line in overrides]
    try:
        with (
            hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"),
            _search_path(outside_folders()) as further,
        ):
            composed = hydra.compose(root, lines + further)
        plain = _renamed_back(OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        own = re.search(r"ConfigError raised while resolving interpolation: (.*)\n\s*full_key: (\S+)", str(error))
        if own:  # of _variable
            raise ConfigError(f"{own[2]}: {own[1]}") from None
        raise ConfigError(f"{root}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{root}: a value is nested too deeply") from None
    expanded: dict[str, Any] = _expand_home(plain)
    return expanded


@contextlib.contextmanager
def _search_path(folders: Iterable[Path]) -> Iterator[list[str]]:
    """Yields the override with which Hydra also looks for groups in `folders`; none without folders."""
    places, recipes = [], recipe_folders()
    with tempfile.TemporaryDirectory(prefix="auricle-recipes-") as scratch:
        for number, folder in enumerate(folders):
            place = folder
            if folder in recipes:  # Hydra looks for experiment/NAME.yaml
                place = Path(scratch, str(number))
                place.mkdir()
                (place / EXPERIMENT).symlink_to(folder, target_is_directory=True)
            places.append("'" + place.as_uri() + "'")
        for group, name in without_yaml():
            file = Path(scratch, "plugins", group, f"{name}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"name: {name}\n", encoding="utf-8")
        if (bare := Path(scratch, "plugins")).is_dir():
            places.append("'" + bare.as_uri() + "'")
        yield [f"hydra.searchpath=[{','.join(places)}]"] if places else []


def sweep(overrides: Iterable[str]) -> list[list[str]]:
    """Returns every combination of the values that overrides list (a=1,2 or a=range(3)); the last one varies fastest.

    Raises:
        ConfigError: no override lists several values.
    """
    axes: list[list[str]] = []
    for line in overrides:
        if not is_sweep(line):
            axes.append([line])
            continue
        read = OverridesParser.create().parse_override(line)
        sign = line[: len(line) - len(line.lstrip("+"))]
        axes.append([f"{sign}{read.key_or_group}={value}" for value in read.sweep_string_iterator()])
    if all(len(axis) == 1 for axis in axes):
        raise ConfigError("--multirun: no override lists several values, such as seed=1,2,3 or seed=range(3)")
    return [list(point) for point in itertools.product(*axes)]


def is_sweep(line: str) -> bool:
    """Returns whether an override lists several values."""
    try:
        return bool(OverridesParser.create().parse_override(line).is_sweep_override())
    except HydraException:
        return False


def to_yaml(values: Mapping[str, Any]) -> str:
    """Returns a composed config as YAML that `compose` reads back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def _groups_in_defaults(file: Path) -> set[str]:
    defaults = OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])  # type: ignore[union-attr]
    return {next(iter(entry)) for entry in defaults if isinstance(entry, dict)}


def to_hydra(line: str, chosen: Mapping[str, list[str]], in_defaults: set[str]) -> str:
    """Converts an override to Hydra's syntax."""
    name, equals, value = line.partition("=")
    name = name.lstrip("+~")
    if name.partition(".")[0].partition("@")[0].partition("/")[0] == "hydra":
        raise ConfigError(f"{line}: auricle has no settings of Hydra itself; leave it out")
    if line.startswith("~") and not equals:
        return line
    if not equals or not name:
        parts = ", ".join(sorted(in_defaults))
        parts += "; --help lists the fields" if line == "help" else ""
        raise ConfigError(f"{line!r} is not an override: write field=value, or group=choice for {parts}")
    if name in DEFINITIONS:
        name = f"{name}{SUFFIX}"
    group, at, place = name.partition("@")
    if at and group == HEAD and place:  # several heads may be chosen, each at its own place
        return _group_choice(name, value, chosen.get(HEAD, []), in_defaults=False)
    if name == HEAD:
        raise ConfigError(f"{line}: heads have names of your choice; write {HEAD}@heads.NAME={value}")
    if name in chosen:
        return _group_choice(name, value, chosen[name], name in in_defaults)
    return f"++{name}={value}" if _is_plain(value) else f"++{name}={_quoted(value)}"


def _is_plain(value: str) -> bool:
    """Returns whether Hydra reads a value as it is; of texts it would drop spaces around them and some backslashes."""
    try:
        read = OverridesParser.create().parse_override(f"++field={value}")
    except HydraException:
        return False
    bare = value.strip()
    return not (read.is_sweep_override() or "\\" in value or (bare != value and read.value() == bare))


def _renamed_back(plain: Any) -> Any:
    return {name.removesuffix(SUFFIX): value for name, value in plain.items()} if isinstance(plain, dict) else plain


def _quoted(value: str) -> str:
    """Quotes a value with a comma, brackets or quotes for Hydra, where backslashes escape only before a quote."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _group_choice(name: str, value: str, choices: list[str], in_defaults: bool) -> str:
    if value not in choices:
        group = name.partition("@")[0]
        near, listed = hint(value, choices), ", ".join(choices) or "none"
        own = "plugins=FOLDER" if group in KINDS.values() else "recipes=FOLDER" if group == EXPERIMENT else ""
        own = f"; one of your own needs {own}" if own else ""
        raise ConfigError(f"{name}={value}: not a choice of {group}{near}; there are: {listed}{own}")
    return f"{name}={value}" if in_defaults else f"+{name}={value}"


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return str(Path(value).expanduser())
    return value
