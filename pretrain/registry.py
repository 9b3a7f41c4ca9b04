"""Plug-ins by module name: `objective: {name: best_rq}` is `pretrain/objectives/best_rq.py`; there is no registration.

A plug-in module defines `Config`, a `@config` dataclass with a field `name: Literal["<module>"]`, and `build`:
frontends `build(config, dim) -> Frontend`; encoders `build(config) -> Encoder`; objectives and heads
`build(config, shape) -> Objective | Head`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from data_pipeline.core.schema import PluginChoice, PluginConfig, hint

if TYPE_CHECKING:  # the interfaces import torch
    from pretrain.interfaces.configs import EncoderConfig, FrontendConfig, HeadConfig, ObjectiveConfig
    from pretrain.interfaces.models import Encoder, Frontend, ModelShape
    from pretrain.interfaces.objectives import Head, Objective

PACKAGES = {
    "frontends": "pretrain.models.frontends",
    "encoders": "pretrain.models.encoders",
    "objectives": "pretrain.objectives",
    "heads": "pretrain.heads",
}
"""Kind of plug-in -> the package whose modules are the plug-ins of that kind."""


def names(kind: str) -> list[str]:
    """Returns the names of the plug-ins of a kind (a key of PACKAGES), sorted."""
    package = importlib.import_module(PACKAGES[kind])
    found = pkgutil.iter_modules(package.__path__)
    return sorted(module.name for module in found if not module.ispkg and not module.name.startswith("_"))


def module(kind: str, name: str) -> ModuleType:
    """Returns the plug-in's module. Raises ValueError naming the choices."""
    known = names(kind)
    if name not in known:
        raise ValueError(f"there is no {kind[:-1]} {name!r}{hint(name, known)}; there are: {', '.join(known)}")
    return importlib.import_module(f"{PACKAGES[kind]}.{name}")


def config_type(kind: str, name: str) -> type[PluginConfig]:
    """Returns the plug-in's `Config` dataclass."""
    found: type[PluginConfig] = module(kind, name).Config
    return found


def build_frontend(config: FrontendConfig, dim: int) -> Frontend:
    """Returns the front end of a config, with `dim` output channels."""
    built: Frontend = module("frontends", config.name).build(config, dim)
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


def choice(kind: str) -> PluginChoice:
    """Returns the annotation of a config field that holds a plug-in of this kind."""
    return PluginChoice(kind[:-1], functools.partial(names, kind), functools.partial(config_type, kind))
