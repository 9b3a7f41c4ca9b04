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
from typing import Any

from data_pipeline.core.schema import PluginChoice, suggest

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
        near = suggest(name, known)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise ValueError(f"there is no {kind[:-1]} {name!r}{hint}; there are: {', '.join(known)}")
    return importlib.import_module(f"{PACKAGES[kind]}.{name}")


def config_type(kind: str, name: str) -> type[Any]:
    """Returns the plug-in's `Config` dataclass."""
    found: type[Any] = module(kind, name).Config
    return found


def build(kind: str, config: Any, *args: Any) -> Any:
    """Returns the object that the plug-in named by `config.name` builds."""
    return module(kind, config.name).build(config, *args)


def choice(kind: str) -> PluginChoice:
    """Returns the annotation of a config field that holds a plug-in of this kind."""
    return PluginChoice(kind[:-1], functools.partial(names, kind), functools.partial(config_type, kind))
