"""Overrides from the command line to one plain config, through Hydra. The only home of Hydra.

Hydra only composes: every value goes through `data_pipeline.core.schema.load` afterwards, which knows types and limits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.core.schema import ConfigError, suggest

CONF = Path(__file__).resolve().parents[2] / "conf"


def compose(root: str, overrides: Iterable[str], folder: Path = CONF) -> dict[str, Any]:
    """The config that `folder/root.yaml` and the overrides describe, with `~` expanded in every value.

    An override is `field=value`, `group=choice` (a leading + is accepted) or `~field`. Raises ConfigError.
    """
    chosen = groups(folder)
    in_defaults = _groups_in_defaults(folder / f"{root}.yaml")
    lines = [_override(line, chosen, in_defaults) for line in overrides]
    try:
        with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            composed = hydra.compose(root, lines)
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{root}: {' '.join(str(error).split())}") from None
    expanded: dict[str, Any] = _expand_home(plain)
    return expanded


def sweep(overrides: Iterable[str]) -> list[list[str]]:
    """Hydra's multirun: every combination of the values that overrides list (a=1,2 or a=range(3)), the last fastest.

    Raises ConfigError where nothing is listed.
    """
    axes: list[list[str]] = []
    for line in overrides:
        try:
            read = OverridesParser.create().parse_override(line)
            listed = read.is_sweep_override()
        except HydraException:
            listed = False
        sign = line[: len(line) - len(line.lstrip("+"))]
        axes.append(
            [f"{sign}{read.key_or_group}={value}" for value in read.sweep_string_iterator()] if listed else [line]
        )
    if all(len(axis) == 1 for axis in axes):
        raise ConfigError("--multirun: no override lists several values, such as seed=1,2,3 or seed=range(3)")
    return [list(point) for point in itertools.product(*axes)]


def groups(folder: Path = CONF) -> dict[str, list[str]]:
    """The config groups below `folder` and their choices."""
    return {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and not group.name.startswith(("_", "."))
    }


def to_yaml(values: Mapping[str, Any]) -> str:
    """A composed config as YAML that `compose` reads back alike."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def _groups_in_defaults(file: Path) -> set[str]:
    defaults = OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])  # type: ignore[union-attr]
    return {next(iter(entry)) for entry in defaults if isinstance(entry, dict)}


def _override(line: str, chosen: Mapping[str, list[str]], in_defaults: set[str]) -> str:
    """One override as Hydra shall see it."""
    if line.startswith("~") and "=" not in line:
        return line
    name, equals, value = line.partition("=")
    name = name.lstrip("+")
    if not equals or not name:
        parts = ", ".join(sorted(in_defaults))
        raise ConfigError(f"{line!r} is no override: write field=value, or group=choice for {parts}")
    if name in chosen:
        return _group_choice(name, value, chosen[name], name in in_defaults)
    try:
        plain = not OverridesParser.create().parse_override(f"++{name}={value}").is_sweep_override()
    except HydraException:
        plain = False
    plain = plain and "\\" not in value  # Hydra would drop some
    return f"++{name}={value}" if plain else f"++{name}={_quoted(value)}"


def _quoted(value: str) -> str:
    """A path with a comma, brackets, quotes … as a Hydra string: there, backslashes escape only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _group_choice(name: str, value: str, choices: list[str], in_defaults: bool) -> str:
    if value not in choices:
        near = suggest(value, choices)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"{name}={value}: there is no such {name}; {hint}there are: {', '.join(choices) or 'none'}")
    return f"{name}={value}" if in_defaults else f"+{name}={value}"


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return str(Path(value).expanduser())
    return value
