"""Plug-ins by module name: `objective: {name: best_rq}` is `pretrain/objectives/best_rq.py`; there is no registration.

Further plug-ins are `objectives/NAME.py`, `heads/NAME.py` … of the places in data_pipeline.core.plugins.

A plug-in module defines `Config`, a `@config` dataclass with a field `name: Literal["<module>"]`, and `build`:
frontends `build(config, dim) -> Frontend`; embeddings `build(config, dim) -> Embedding`; encoders
`build(config) -> Encoder`; objectives and heads `build(config, shape) -> Objective | Head`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.core import plugins
from data_pipeline.core.definitions import definition
from data_pipeline.core.schema import ConfigError, PluginChoice, PluginConfig, hint

if TYPE_CHECKING:  # the interfaces import torch
    from pretrain.interfaces.configs import (
        EmbeddingConfig,
        EncoderConfig,
        FrontendConfig,
        HeadConfig,
        ObjectiveConfig,
    )
    from pretrain.interfaces.models import Embedding, Encoder, Frontend, ModelShape
    from pretrain.interfaces.objectives import Head, Objective

PACKAGES = {
    "frontends": "pretrain.models.frontends",
    "embeddings": "pretrain.models.embeddings",
    "encoders": "pretrain.models.encoders",
    "objectives": "pretrain.objectives",
    "heads": "pretrain.heads",
}
"""Kind of plug-in -> the package whose modules are the plug-ins of that kind."""


CONF = "conf"
"""Subfolder of a plug-in folder with YAML files of config groups, as in auricle's own conf/."""


class Place(NamedTuple):
    """The module of a plug-in."""

    module: str
    file: Path
    outside: bool
    """Whether it is not part of auricle."""


def places(kind: str) -> dict[str, Place]:
    """Returns the module of each plug-in of a kind (a key of PACKAGES), by the plug-in's name; imports none.

    Raises:
        ConfigError: a plug-in from outside has the name of another one.
    """
    own = importlib.import_module(PACKAGES[kind])
    found = {name: Place(f"{PACKAGES[kind]}.{name}", file, False) for name, file in _modules(own.__path__)}
    for source in plugins.sources():
        for name, file in _modules([str(source.folder / kind)]):
            if name in found:
                raise ConfigError(
                    f"plug-in {file}: there is another {kind[:-1]} {name}, {found[name].file}; rename one of the files"
                )
            found[name] = Place(f"{source.package}.{kind}.{name}", file, True)
    return found


def _modules(folders: Iterable[str]) -> list[tuple[str, Path]]:
    found = []
    for folder in folders:
        for module in pkgutil.iter_modules([folder]):
            if not module.name.startswith("_") and not module.ispkg:
                found.append((module.name, Path(folder) / f"{module.name}.py"))
    return found


def names(kind: str) -> list[str]:
    """Returns the names of the plug-ins of a kind (a key of PACKAGES), sorted."""
    return sorted(places(kind))


def allow(folders: Iterable[str | Path]) -> None:
    """Makes plug-ins of these folders available to this process and those that it starts.

    Raises:
        ConfigError: a folder does not exist or contains no plug-ins, or a name exists already.
    """
    folders = list(folders)
    plugins.allow(folders)
    for folder in folders:
        wanted = (*PACKAGES, CONF)
        if not any((Path(folder).expanduser() / name).is_dir() for name in wanted):
            raise ConfigError(
                f"plugins=[{folder}]: no plug-ins there: it has none of the folders {', '.join(wanted)}; an objective "
                f"NAME is the file {folder}/objectives/NAME.py"
            )
    for kind in PACKAGES:
        places(kind)


def module(kind: str, name: str) -> ModuleType:
    """Returns the plug-in's module.

    Raises:
        ValueError: there is no such plug-in; the message has the choices.
        ConfigError: a plug-in from outside cannot be imported, or is not written as required.
    """
    known = places(kind)
    if name not in known:
        raise ValueError(f"there is no {kind[:-1]} {name!r}{hint(name, known)}; there are: {', '.join(sorted(known))}")
    place = known[name]
    if not place.outside:
        return importlib.import_module(place.module)
    try:
        found = importlib.import_module(place.module)
    except Exception as error:
        raise ConfigError(f"plug-in {place.file}: cannot be imported ({type(error).__name__}: {error})") from error
    _require_form(kind, name, found, place.file)
    return found


def _require_form(kind: str, name: str, module: ModuleType, file: Path) -> None:
    """Raises ConfigError where a plug-in from outside lacks what every plug-in has."""
    from pretrain.interfaces import configs

    base = getattr(configs, f"{kind[:-1].capitalize()}Config")
    made = getattr(module, "Config", None)
    if not (isinstance(made, type) and issubclass(made, base) and dataclasses.is_dataclass(made)):
        wanted = f"its class Config must be a @config dataclass derived from {base.__name__}"
    elif next(field.default for field in dataclasses.fields(made) if field.name == "name") != name:
        wanted = f'its Config must have the field name: Literal["{name}"] = "{name}", as the file is named'
    elif not callable(getattr(module, "build", None)):
        wanted = "it must define the function build, see docs/plugins.md"
    else:
        return
    raise ConfigError(f"plug-in {file}: {wanted}")


def config_type(kind: str, name: str) -> type[PluginConfig]:
    """Returns the plug-in's `Config` dataclass."""
    found: type[PluginConfig] = module(kind, name).Config
    return found


def documented_type(kind: str, name: str) -> type[PluginConfig]:
    """Returns a class with the fields of the plug-in's `Config`, without importing a plug-in of auricle's."""
    place = places(kind).get(name)
    if place is None or place.outside:
        return config_type(kind, name)
    found: type[PluginConfig] = definition(place.module, "Config", _imports_torch)
    return found


def _imports_torch(module: str) -> bool:
    """Returns whether a module may import torch: any of `pretrain` but the base classes of configs."""
    return module.startswith("pretrain.") and module != "pretrain.interfaces.configs"


def build_frontend(config: FrontendConfig, dim: int) -> Frontend:
    """Returns the front end of a config, with `dim` output channels."""
    built: Frontend = module("frontends", config.name).build(config, dim)
    return built


def build_embedding(config: EmbeddingConfig, dim: int) -> Embedding:
    """Returns the embedding of a config, with `dim` output channels; 0: with channels of its own choice."""
    built: Embedding = module("embeddings", config.name).build(config, dim)
    return built


def build_encoder(config: EncoderConfig) -> Encoder:
    """Returns the encoder of a config."""
    built: Encoder = module("encoders", config.name).build(config)
    return built


def build_objective(config: ObjectiveConfig, shape: ModelShape) -> Objective:
    """Returns the objective of a config for a model of that shape."""
    built: Objective = module("objectives", config.name).build(config, shape)
    return built


def build_head(config: HeadConfig, shape: ModelShape) -> Head:
    """Returns the head of a config for a model of that shape."""
    built: Head = module("heads", config.name).build(config, shape)
    return built


def choice(kind: str, optional: bool = False) -> PluginChoice:
    """Returns the annotation of a config field that holds a plug-in of this kind, or null where it is optional."""
    return PluginChoice(
        kind[:-1],
        functools.partial(names, kind),
        functools.partial(config_type, kind),
        functools.partial(documented_type, kind),
        optional,
    )
